"""What a stage is trained with: parameter groups, accelerator, optimizer and schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import nn

from mllm.config.recipe import Stage
from mllm.errors import MLLMError
from mllm.model import Model, trained_module
from mllm.training.sharding import asked


def parameter_groups(model: Model, stage: Stage) -> list[dict[str, Any]]:
    """Return the optimizer's groups: each part (or path inside one) that trains, with its learning rate.

    A parameter belongs to the longest path that names it; an adapter's, wherever it stands, to ``adapters``.

    Raises:
        MLLMError: a path that is no part, or weights that are quantised.
    """
    model.requires_grad_(False)
    inside = {id(parameter) for parameter in model.adapters.parameters()}
    owner: dict[int, tuple[str, nn.Parameter]] = {}
    for path in sorted(stage.train, key=len):
        for parameter in trained_module(model, path).parameters():
            if id(parameter) not in inside or path.startswith("adapters"):
                owner[id(parameter)] = (path, parameter)
    groups = []
    for path, rate in stage.train.items():
        own = [parameter for name, parameter in owner.values() if name == path]
        if not all(parameter.is_floating_point() for parameter in own):
            raise MLLMError(f"A stage's 'train' names {path!r}, which is quantised. Set quantize: null, or use LoRA.")
        groups.append({"params": [parameter.requires_grad_(True) for parameter in own], "lr": rate})
    return groups


def accelerator_for(stage: Stage, folder: Path) -> Accelerator:
    """Return accelerate's engine, which brings devices, processes, precision and trackers.

    Raises:
        MLLMError: a tracker that is not installed, or weights divided among processes.
    """
    present = {str(tracker) for tracker in get_available_trackers()}
    if missing := [name for name in stage.track if name not in present]:
        raise MLLMError(f"track: {', '.join(missing)} cannot be imported: pip install 'mllm-assembly[track]'.")
    # A process whose examples have no picture leaves the connector out of its graph.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    asked()  # first: accelerate is not to divide anything itself
    accelerator = Accelerator(
        mixed_precision=precision(stage),
        log_with=list(stage.track) or None,
        project_dir=folder,
        kwargs_handlers=[unused],
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise MLLMError(
            "DeepSpeed would divide what trains, which is small here. Launch with FSDP, which divides the frozen "
            "weights (docs/accelerate/fsdp.yaml), or without either: every process then holds the whole model (DDP)."
        )
    if stage.track:
        accelerator.init_trackers(stage.name, config={"steps": stage.steps, "batch_size": stage.batch_size})
    return accelerator


def set_up(model: Model, stage: Stage) -> None:
    """Turn on what saves memory or time in the language model, which stays in evaluation mode."""
    if model.lm is None:
        return
    if stage.optim.checkpointing:
        lm = model.lm.model  # renamed in transformers 5.23
        enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if stage.optim.compile:
        model.lm.model.compile()


def recompute(model: Model) -> None:
    """Let the language model's layers recompute their activations, which they do in training mode only.

    What is inside the layers, dropout above all, stays in evaluation mode.
    """
    for layer in model.lm.layers:
        layer.training = True


def precision(stage: Stage) -> str:
    """Return accelerate's word; ``auto`` is bfloat16 on a GPU that has it, else what the parts are loaded in."""
    names = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
    if stage.optim.precision == "auto":
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    return names[stage.optim.precision]


def schedule_name(stage: Stage) -> str:
    """Return the name that transformers gives the stage's schedule."""
    return "constant_with_warmup" if stage.optim.schedule == "constant" else stage.optim.schedule
