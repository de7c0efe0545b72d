"""Write and read the state of training, from which a killed run continues bit for bit.

``checkpoint.safetensors`` is one file, replaced whole. It holds the trained tensors, the optimizer's, the states of the
random generators and, in its header, stage, step, learning rates, schedule, the fingerprints of the frozen parts and
the SHA-256 of all this. The position in the data follows from the step: the stream is a function of the seed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor

from mllm.config.base import Spec
from mllm.config.messages import checked
from mllm.errors import MLLMError, first_line
from mllm.hub.verified import DamagedFile, read_verified, save_verified
from mllm.processes import processes
from mllm.system import parse_json

NAME = "checkpoint.safetensors"
GROUPS = ("model", "best", "optimizer", "random")  # of tensors: in the file a name starts with its group's
SCALARS = ("stage", "step", "schedule", "rates", "frozen", "best_loss", "waited", "fingerprints")  # in the header
RENAMED = {"best_loss": "best"}  # as the header calls them

Tensors = dict[str, Tensor]


class Header(Spec):
    """The header of a checkpoint."""

    stage: int = Field(ge=0)
    step: int = Field(ge=0)
    schedule: dict[str, Any]
    rates: list[float]
    frozen: dict[str, Any]
    best: float | None
    waited: int = Field(ge=0)
    fingerprints: dict[str, str] = Field({})


@dataclass
class TrainingState:
    """How far training has come.

    Attributes:
        stage: number of the stage to continue with.
        step: steps done in it.
        model: the trained tensors.
        best: the trained tensors at the lowest validation loss of the stage, where these are to be kept.
        optimizer: the optimizer's tensors, ``INDEX.KEY``.
        random: the states of the generators, ``PROCESS.DEVICE``.
        schedule: the state of the learning rate schedule.
        rates: the current learning rates.
        frozen: hashes of the frozen parts, of the stages done.
        best_loss: the lowest validation loss of the stage so far.
        waited: validations since then.
        fingerprints: of the frozen parts; none in a checkpoint of an earlier version.
    """

    stage: int = 0
    step: int = 0
    model: Tensors = field(default_factory=dict)
    best: Tensors = field(default_factory=dict)
    optimizer: Tensors = field(default_factory=dict)
    random: Tensors = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    frozen: dict[str, Any] = field(default_factory=dict)
    best_loss: float | None = None
    waited: int = 0
    fingerprints: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write the state to a run's folder; of several processes the main one does.

        Raises:
            MLLMError: the folder cannot be written; the checkpoint that was there before is still there.
        """
        if not self.writes:
            return
        header = json.dumps({RENAMED.get(name, name): getattr(self, name) for name in SCALARS})
        try:
            save_verified(folder / NAME, self._prefixed(), header)
        except (OSError, SafetensorError) as error:
            raise MLLMError(f"{folder / NAME} cannot be written: {error}. Free some disk space.") from error

    @classmethod
    def read(cls, folder: Path) -> TrainingState | None:
        """Return the state in a run's folder, or None where training had not come to a checkpoint.

        Raises:
            MLLMError: the file cannot be read, or its content is not what was written.
        """
        path = folder / NAME
        if not os.path.lexists(path):
            return None
        if not os.path.isfile(path):
            raise MLLMError(f"{path} is no regular file. Remove it to start the run from its beginning.")
        try:
            tensors, written = read_verified(path, checksum_required=False)
            header = checked(Header, parse_json(written), label="its header")
            state = cls(**{name: getattr(header, RENAMED.get(name, name)) for name in SCALARS})
            for key, tensor in tensors.items():
                group, _, name = key.partition(".")
                state._group(group)[name] = tensor
            return state
        except (DamagedFile, OSError, KeyError, TypeError, ValueError) as error:
            raise MLLMError(f"{path} cannot be read: {error}. Remove it to start the run from its beginning.") from None

    @property
    def writes(self) -> bool:
        """Whether this process writes the state."""
        return bool(processes().is_main_process)

    def _prefixed(self) -> Tensors:
        return {f"{group}.{name}": tensor for group in GROUPS for name, tensor in self._group(group).items()}

    def _group(self, group: str) -> Tensors:
        return {"model": self.model, "best": self.best, "optimizer": self.optimizer, "random": self.random}[group]


@contextlib.contextmanager
def explain_misfit() -> Iterator[None]:
    """Turn what torch raises for tensors and states that do not fit into an `MLLMError`."""
    try:
        yield
    except MLLMError:
        raise
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise MLLMError(
            f"The checkpoint does not fit the run: {first_line(error)} Remove {NAME} to start from the beginning."
        ) from error


def random_states() -> Tensors:
    """Return the states of torch's generators, of every process."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    gathered = enumerate(gather_object([states]))
    return {f"{process}.{device}": state for process, each in gathered for device, state in each.items()}


def set_random_states(states: Tensors) -> int:
    """Set torch's generators to the states of a checkpoint; return the number of processes that wrote it.

    A process that there was not then starts a generator of its own.
    """
    rank = processes().process_index
    if f"{rank}.cpu" in states:
        torch.set_rng_state(states[f"{rank}.cpu"])
    else:
        digest = hashlib.sha256(states["0.cpu"].numpy().tobytes() + str(rank).encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little"))
    if f"{rank}.cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[f"{rank}.cuda"])
    return len({name.partition(".")[0] for name in states})


def optimizer_state(optimizer: Any) -> Tensors:
    """Return the optimizer's tensors by flat names, ``INDEX.KEY``, or ``INDEX.KEY/INNER`` where it groups them."""
    return {
        f"{index}.{key}": torch.as_tensor(value).detach().cpu().contiguous()
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in _flat(entry)
    }


def _flat(entry: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in entry.items():
        if isinstance(value, dict):
            yield from ((f"{key}/{inner}", each) for inner, each in value.items())
        else:
            yield key, value


def _grouped(entry: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return an entry as the optimizer has it; whole numbers were no tensors."""
    grouped: dict[str, Any] = {}
    for name, tensor in entry.items():
        key, _, inner = name.partition("/")
        value = tensor if tensor.ndim or tensor.is_floating_point() else int(tensor)
        if inner:
            grouped.setdefault(key, {})[inner] = value
        else:
            grouped[key] = value
    return grouped


def set_optimizer(optimizer: Any, tensors: Tensors, rates: list[float]) -> None:
    """Set the optimizer's tensors and learning rates to those of a checkpoint.

    Raises:
        MLLMError: the checkpoint is of an earlier version, whose optimizer had other groups of parameters.
    """
    if len(rates) != len(optimizer.param_groups):
        raise MLLMError(
            f"The checkpoint's optimizer has {len(rates)} groups of parameters, and this version makes "
            f"{len(optimizer.param_groups)} (vectors are not decayed). Start the run from its beginning."
        )
    state: dict[int, Tensors] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    entries = {index: _grouped(entry) for index, entry in state.items()}
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, entry in optimizer.state.items():
        for key, value in entry.items():
            if key.startswith("exp_avg") and value.shape != parameter.shape:
                raise ValueError(f"the optimizer's {key} is {tuple(value.shape)}, of a tensor {tuple(parameter.shape)}")
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
