"""Where training stands, in one file that is replaced whole: what a killed run goes on from, bit for bit.

``checkpoint.safetensors`` holds the trained tensors, the optimizer's, the random states, and (in its header) stage,
step, learning rates and schedule. The position in the data follows from the step: the stream is a function of the
seed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mllm.errors import MLLMError
from mllm.processes import processes
from mllm.system import write

NAME = "checkpoint.safetensors"


@dataclass
class State:
    """Where training stands.

    Attributes:
        stage: number of the stage to go on with.
        step: steps done in it.
        tensors: ``model.*``, ``best.*``, ``optimizer.INDEX.KEY`` and ``random.*``.
        schedule: the schedule's own state.
        rates: the learning rates in force.
        frozen: hashes of the frozen parts, of the stages done.
        best: the lowest validation loss of the stage so far; the tensors that had it are ``best.*``.
        waited: validations since then.
    """

    stage: int = 0
    step: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    frozen: dict[str, Any] = field(default_factory=dict)
    best: float | None = None
    waited: int = 0

    def write(self, folder: Path) -> None:
        """Write it to a run's folder; of several processes the main one does.

        Raises:
            MLLMError: the folder cannot be written; what was there before is still there.
        """
        if not processes().is_main_process:
            return
        keys = ("stage", "step", "schedule", "rates", "frozen", "best", "waited")
        header = {key: getattr(self, key) for key in keys}
        metadata = {"state": json.dumps(header)}
        try:
            write(folder / NAME, lambda file: save_file(self.tensors, file, metadata=metadata))
        except (OSError, SafetensorError) as error:
            raise MLLMError(f"{folder / NAME} cannot be written: {error}. Free some room.") from error

    @classmethod
    def read(cls, folder: Path) -> State | None:
        """Return what a run's folder holds, or None where training had not come that far."""
        path = folder / NAME
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads(file.metadata()["state"])
                return cls(**header, tensors={name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise MLLMError(f"{path} cannot be read: {error}. Remove it to start the run from its beginning.") from None


def random_states() -> dict[str, Tensor]:
    """Return the states of torch's generators, of every process."""
    own = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        own["cuda"] = torch.cuda.get_rng_state()
    return {
        f"random.{process}.{name}": state
        for process, states in enumerate(gather_object([own]))
        for name, state in states.items()
    }


def set_random_states(tensors: dict[str, Tensor]) -> None:
    """Put torch's generators back to where they were.

    Raises:
        MLLMError: the run was started with another number of processes.
    """
    here = processes()
    there = len({name.split(".")[1] for name in tensors if name.startswith("random.")})
    if there != here.num_processes:
        raise MLLMError(f"The run was started with {there} processes, and now there are {here.num_processes}.")
    own = f"random.{here.process_index}"
    torch.set_rng_state(tensors[f"{own}.cpu"])
    if f"{own}.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[f"{own}.cuda"])


def optimizer_tensors(optimizer: Any) -> dict[str, Tensor]:
    """Return the optimizer's tensors by flat names."""
    return {
        f"optimizer.{index}.{key}": torch.as_tensor(value).detach().cpu().contiguous()
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }


def set_optimizer(optimizer: Any, tensors: dict[str, Tensor], rates: list[float]) -> None:
    """Put the optimizer back to where it was."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def changes(before: dict[str, Any], after: dict[str, Any], path: str = "") -> list[str]:
    """Return every key that two resolved recipes have otherwise, as ``key: before -> after``."""
    found = []
    for key in [*before, *(key for key in after if key not in before)]:
        old, new = before.get(key), after.get(key)
        if isinstance(old, list) and isinstance(new, list):
            old, new = dict(enumerate(old)), dict(enumerate(new))
        if isinstance(old, dict) and isinstance(new, dict):
            found += changes(old, new, f"{path}{key}.")
        elif old != new:
            found.append(f"{path}{key}: {old!r} -> {new!r}")
    return found
