"""Print what FSDP leaves in a process after a forward pass: states of layers, their bytes, and the error of logits.

python fsdp_states.py FOLDER DEVICE
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ.update(
    {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29771",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        **os.environ,
    }
)

import torch
import torch.distributed

from mllm.lms.language_model import LanguageModel
from mllm.processes import processes
from mllm.training import sharding


def state(layer: Any) -> str:
    """Return the name of a layer's state: SHARDED or UNSHARDED, as torch's FSDP2 calls it."""
    fsdp = layer._get_fsdp_state()
    groups = getattr(fsdp, "_fsdp_param_groups", None) or [fsdp._fsdp_param_group]
    return str(groups[0]._sharded_state.name)


if __name__ == "__main__":
    folder, device = sys.argv[1:]
    torch.distributed.init_process_group("gloo" if device == "cpu" else "nccl")
    processes()
    lm, whole = LanguageModel(model=folder), LanguageModel(model=folder).to(device)
    sharding.divide(lm, torch.device(device))
    lm.to(device)
    ids = torch.arange(1, 8, device=device)[None]
    with torch.no_grad():
        logits = lm.logits(lm.embed(ids), torch.ones_like(ids))
        expected = whole.logits(whole.embed(ids), torch.ones_like(ids))
    print("STATES", *(state(layer) for layer in lm.layers))
    print("DIFFERENCE", float((logits - expected).abs().max()))
    parameters: list[Any] = [parameter for layer in lm.layers for parameter in layer.parameters()]
    print("BYTES", sum(parameter.to_local().nbytes for parameter in parameters))
    torch.distributed.destroy_process_group()
