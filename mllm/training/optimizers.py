"""Build the optimizer of a stage: AdamW of torch, or one of bitsandbytes that takes less memory."""

from __future__ import annotations

from typing import Any

import torch

from mllm.config.recipe import OptimSpec

Groups = list[dict[str, Any]]  # of parameters, each with its learning rate

# States of 8 bits (arXiv:2110.02861), and states that move to the host where the GPU's memory is short (2305.14314).
BITSANDBYTES = {"adamw-8bit": "AdamW8bit", "paged-adamw": "PagedAdamW", "paged-adamw-8bit": "PagedAdamW8bit"}


def optimizer_for(spec: OptimSpec, groups: Groups) -> torch.optim.Optimizer:
    """Return the optimizer of groups of parameters; on a GPU an update of torch's is one kernel."""
    groups = matrices_apart(groups) if spec.weight_decay else groups
    if spec.name in BITSANDBYTES:
        import bitsandbytes

        kind: Any = getattr(bitsandbytes.optim, BITSANDBYTES[spec.name])
        optimizer: torch.optim.Optimizer = kind(groups, weight_decay=spec.weight_decay, betas=spec.betas)
        return optimizer
    fused = all(parameter.is_cuda for group in groups for parameter in group["params"]) or None
    return torch.optim.AdamW(groups, weight_decay=spec.weight_decay, betas=spec.betas, fused=fused)


def matrices_apart(groups: Groups) -> Groups:
    """Return groups whose vectors and numbers (biases, weights of norms, temperatures) have no weight decay."""
    divided = []
    for group in groups:
        for decayed, options in ((True, {}), (False, {"weight_decay": 0.0})):
            if parameters := [parameter for parameter in group["params"] if (parameter.dim() > 1) == decayed]:
                divided.append({**group, "params": parameters, **options})
    return divided
