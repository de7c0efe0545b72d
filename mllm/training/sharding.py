"""Several processes hold a frozen language model together: each has a part of every layer's weights (FSDP2).

Notable: only what is frozen is divided. What trains stays whole in every process (DDP), so checkpoints and saved models
are those of one process. A layer is put together while it computes, which all processes do at the same time.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from mllm.config.recipe import Stage
from mllm.devices import choose_device
from mllm.errors import MLLMError
from mllm.model import Model
from mllm.processes import processes


@functools.cache
def asked() -> bool:
    """Whether accelerate's configuration asks for FSDP.

    The setting is removed from the environment: accelerate itself would divide trained weights, too, and never on CPUs.
    """
    return os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")


def loading_device() -> torch.device:
    """Return the device on which training builds models: the CPU where their weights are to be divided first."""
    return torch.device("cpu") if asked() and processes().num_processes > 1 else choose_device()


def divide_where_asked(model: Model, stage: Stage, device: torch.device) -> int:
    """Divide the language model's frozen weights where accelerate's configuration asks for FSDP.

    Returns:
        The number of layers that are divided; 0 where nothing is.

    Raises:
        MLLMError: the stage evaluates while it trains, or the language model cannot be divided.
    """
    if not (asked() and processes().num_processes > 1 and model.generates_text):
        return 0
    if stage.eval.every:
        raise MLLMError(
            "FSDP: processes that share the weights cannot answer each at its own pace. Set eval.every: null, and "
            "run mllm eval afterwards."
        )
    return divide(model.lm, device)


def divide(lm: Any, device: torch.device) -> int:
    """Divide the frozen weights of a language model's layers among the processes, and move them to their devices.

    Returns:
        The number of layers.

    Raises:
        MLLMError: weights that are quantized, or layers that are unknown or do not run once a batch.
    """
    if not all(parameter.is_floating_point() for parameter in lm.model.parameters()):
        raise MLLMError("FSDP does not divide quantized weights. Set lm.quantize: null, or launch without FSDP (DDP).")
    if not lm.layers or not lm.whole_batches:
        raise MLLMError(
            "FSDP needs a language model whose layers run once a batch in every process, and this one's do not. "
            "Launch without FSDP: every process then holds the whole model (DDP)."
        )
    mesh = init_device_mesh(device.type, (processes().num_processes,))
    if not isinstance(lm.model, FSDPModule):
        trained = {parameter for parameter in lm.model.parameters() if parameter.requires_grad}
        for layer in lm.layers:
            # Explicit: a layer that is its own root would stay whole from its forward pass to its backward pass.
            fully_shard(layer, mesh=mesh, ignored_params=trained, reshard_after_forward=True)
        inside = {parameter for layer in lm.layers for parameter in layer.parameters()}
        # A root gathers the next layer while one computes. Its own weights (embeddings, norms) stay whole.
        fully_shard(lm.model, mesh=mesh, ignored_params=set(lm.model.parameters()) - inside | trained)
    return len(lm.layers)


def divided(module: nn.Module | None) -> bool:
    """Whether a module's weights are divided among processes."""
    return module is not None and any(isinstance(part, FSDPModule) for part in module.modules())


def keep_apart(model: nn.Module) -> None:
    """Exclude frozen tensors from DDP: every process loads the same, so they need not be broadcast."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    fixed = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen + fixed)
