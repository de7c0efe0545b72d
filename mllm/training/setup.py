"""Build what a stage trains with: objectives, trained parameters, accelerator, optimizer and schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mllm.capabilities import ReadsData, ReadsNoPrompt
from mllm.config.recipe import Stage
from mllm.data.sources import Source, answers_of
from mllm.devices import choose_device, computes_in_bfloat16
from mllm.errors import MLLMError
from mllm.model import Model
from mllm.objectives.build import objectives_of
from mllm.parts import trained_module
from mllm.prompts.batch import Batch
from mllm.prompts.pieces import Piece
from mllm.training.checkpoint import TrainingState, explain_misfit, set_optimizer
from mllm.training.compiling import CompiledLayers
from mllm.training.depth import by_depth, drop_paths
from mllm.training.optimizers import Groups, optimizer_for
from mllm.training.schedule import schedule_for
from mllm.training.sharding import asked, keep_apart

Rows = Sequence[list[Piece]]
Micro = tuple[Rows, Tensor | None, Batch | None]  # examples, their features, their ids


class Objectives:
    """A stage's objectives and their weights in its loss.

    Args:
        stage: names them.
    """

    def __init__(self, stage: Stage) -> None:
        self.names = [spec.type for spec in stage.objectives]
        self.weights = [spec.weight for spec in stage.objectives]
        self.losses = objectives_of(stage.objectives)

    @property
    def comparing(self) -> list[str]:
        """Return the names of the objectives that compare the examples of a batch, which therefore is not split."""
        named = zip(self.names, self.losses, strict=True)
        return [name for name, objective in named if not objective.per_example]

    @property
    def read_prompts(self) -> bool:
        """Whether an objective depends on the prompt around images and targets, solved examples included."""
        return any(not isinstance(objective, ReadsNoPrompt) for objective in self.losses)

    def read_data(self, model: Model, sources: Sequence[Source]) -> None:
        """Let the objectives that read the training data before the first step read its answers."""
        for objective in self.losses:
            if isinstance(objective, ReadsData):
                objective.read_data(model, answers_of(sources))

    def __call__(self, model: Any, micro: Micro) -> Tensor:
        """Return each objective's loss ``(n,)``, summed over a batch."""
        return torch.stack(model(*micro, self.losses)).float()

    def count(self, micro: Micro) -> list[float]:
        """Return by how much each objective's sum is to be divided."""
        rows, _, batch = micro
        return [float(objective.count(rows, batch)) for objective in self.losses]


@dataclass(frozen=True)
class Engine:
    """What a step is computed with.

    Args:
        accelerator: brings devices, processes, precision and trackers.
        model: the assembly.
        wrapped: the same, as accelerate distributes it.
        stage: how gradients are clipped.
        optimizer: of the trained parameters.
        schedule: of its learning rates.
        hooks: those of this stage's training alone.
        layers: the language model's, where they are compiled.
    """

    accelerator: Accelerator
    model: Model
    wrapped: Any
    stage: Stage
    optimizer: Any
    schedule: Any
    hooks: Sequence[RemovableHandle] = ()
    layers: CompiledLayers = field(default_factory=CompiledLayers)

    @property
    def rates(self) -> list[float]:
        """Return the current learning rates."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def update(self) -> Tensor:
        """Change the trained parameters by their gradients, which are clipped first and cleared afterwards.

        Returns:
            The norm of all gradients before they were clipped, on the model's device.
        """
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        if self.stage.optim.clip is not None:
            norm = self.accelerator.clip_grad_norm_(parameters, self.stage.optim.clip)
        else:
            self.accelerator.unscale_gradients()
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.model.tokens is not None and "tokens" in self.stage.train:
            self.model.tokens.rescale()
        self.schedule.step()
        return norm

    def close(self) -> None:
        """Freeze the model and release what training held."""
        self.model.requires_grad_(False).eval()
        for hook in self.hooks:
            hook.remove()
        for tracker in self.accelerator.trackers:  # end_training would end the other processes, too
            tracker.finish()
        self.accelerator.free_memory()
        for name in ("forward", "_original_forward"):  # accelerate's, with this stage's precision
            self.model.__dict__.pop(name, None)


def accelerator_for(stage: Stage, folder: Path) -> Accelerator:
    """Return the accelerator, which brings devices, processes, precision and trackers.

    Raises:
        MLLMError: a tracker that is not installed, weights divided by DeepSpeed, or fewer examples in a batch than
            processes.
    """
    present = {str(tracker) for tracker in get_available_trackers()}
    if missing := [name for name in stage.track if name not in present]:
        raise MLLMError(f"track: {', '.join(missing)} cannot be imported: pip install 'mllm-assembly[track]'.")
    # A process whose examples have no image leaves the connector out of its graph.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    asked()  # first: accelerate is not to divide anything itself
    AcceleratorState._reset_state()  # a stage's precision may be another than that of the stage before
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
    if stage.batch_size < accelerator.num_processes:
        raise MLLMError(
            f"Stage {stage.name}: batch_size is {stage.batch_size}, and there are {accelerator.num_processes} "
            "processes, each of which needs an example."
        )
    return accelerator


def parameter_groups(model: Model, stage: Stage) -> Groups:
    """Freeze all that a stage does not train; return the rest as the optimizer's groups, by part or path inside one.

    A parameter belongs to the longest path that names it; an adapter's belongs to ``adapters``, wherever it stands.

    Raises:
        MLLMError: a path that is no part, or weights that are quantized or in float16.
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
        parameters = [parameter for name, parameter in owner.values() if name == path]
        if not all(parameter.is_floating_point() for parameter in parameters):
            raise MLLMError(f"A stage's 'train' names {path!r}, which is quantized. Set quantize: null, or use LoRA.")
        if any(parameter.dtype == torch.float16 for parameter in parameters):
            raise MLLMError(
                f"A stage's 'train' names {path!r}, which is stored in float16, in which training diverges. Set "
                "lm.dtype: float32, or use LoRA."
            )
        groups.append({"params": [parameter.requires_grad_(True) for parameter in parameters], "lr": rate})
    return by_depth(groups, model.encoder, stage.optim.layer_decay) if stage.optim.layer_decay < 1 else groups


def engine_for(accelerator: Accelerator, model: Model, stage: Stage, groups: Groups, state: TrainingState) -> Engine:
    """Return what a stage's steps are computed with, at the step to continue from."""
    assert stage.steps is not None
    set_up(model, stage)
    unprepared = optimizer_for(stage.optim, groups)
    keep_apart(model)
    wrapped, optimizer = accelerator.prepare(model, unprepared)
    schedule = schedule_for(optimizer, stage.optim, stage.steps)
    if state.step:
        with explain_misfit():
            set_optimizer(optimizer, state.optimizer, state.rates)
            schedule.load_state_dict(state.schedule)
    return Engine(
        accelerator, model, wrapped, stage, optimizer, schedule, _hooks(model, stage), _compiled(model, stage)
    )


def _compiled(model: Model, stage: Stage) -> CompiledLayers:
    """Return the language model's layers, to be compiled where a stage asks for it."""
    if not (stage.optim.compile and model.generates_text):
        return CompiledLayers()
    _ = model.lm.runner.separable  # first: it is found out by running them
    return CompiledLayers(model.lm.layers)


def _hooks(model: Model, stage: Stage) -> list[RemovableHandle]:
    """Return the hooks of a stage's training: the encoder's stochastic depth."""
    if not stage.optim.drop_path:
        return []
    return drop_paths(model.encoder, stage.optim.drop_path, model.device)


def set_up(model: Model, stage: Stage) -> None:
    """Turn on what saves memory or time in the language model, which stays in evaluation mode."""
    if model.lm is None:
        return
    if stage.optim.checkpointing:
        lm = model.lm.model  # renamed in transformers 5.23
        enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable
        enable({"use_reentrant": False})


def recompute(model: Model) -> None:
    """Let the language model's layers recompute their activations, which they do in training mode only.

    What is inside the layers, dropout above all, stays in evaluation mode.
    """
    for layer in model.lm.layers:
        layer.training = True


def precision(stage: Stage) -> str:
    """Return accelerate's word; ``auto`` is bfloat16 on a GPU that has it, else the precision of the loaded parts."""
    names = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
    if stage.optim.precision == "auto":
        return "bf16" if computes_in_bfloat16(choose_device()) else "no"
    return names[stage.optim.precision]


def computing_type(stages: Sequence[Stage]) -> torch.dtype | None:
    """Return the type in which a frozen language model is to be loaded: bfloat16 where all stages train in it.

    Autocast would keep a second copy of other weights for the backward pass. None: as it is stored.
    """
    trained = [stage for stage in stages if stage.train]
    frozen = not any(stage.assembly.trains("lm") for stage in stages)
    return torch.bfloat16 if trained and frozen and {precision(stage) for stage in trained} == {"bf16"} else None
