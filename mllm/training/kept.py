"""Write a stage's checkpoints when they are due, keep the last ones (``keep_checkpoints``), and go back to one of them.

The last checkpoint is ``checkpoint.safetensors``. Where more are kept, each also has a name of its own,
``checkpoint-STAGE-STEP.safetensors``, a second link to the same file: STAGE is the number of the stage to continue with
(of ``stages.0``, ``stages.1``, ...), STEP the steps that are done in it.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mllm.config.recipe import Stage
from mllm.encoders.feature_store import FeatureStore
from mllm.errors import MLLMError
from mllm.model import Model
from mllm.system import write
from mllm.training.checkpoint import NAME, TrainingState, optimizer_state, random_states

_KEPT = re.compile(r"checkpoint-(\d+)-(\d+)\.safetensors")


@dataclass
class Checkpoints:
    """Write the checkpoints of one stage.

    Args:
        folder: the run's.
        state: of training, at the step that the stage continues from; validation keeps its best loss up to date.
        store: of the encoder's features.
        stage: how often they are written, and how many are kept.
    """

    folder: Path
    state: TrainingState
    store: FeatureStore
    stage: Stage
    _last: float = field(default_factory=time.monotonic)  # when the last one was written, or the stage began

    @property
    def overdue(self) -> bool:
        """Whether ``checkpoint_minutes`` have passed by this process's clock; that of others may differ."""
        minutes = self.stage.checkpoint_minutes
        return minutes is not None and time.monotonic() - self._last >= 60 * minutes

    def due(self, step: int) -> bool:
        """Whether one is due after a step, whatever the time."""
        return self.stage.checkpoint_every is not None and step % self.stage.checkpoint_every == 0

    def write(self, step: int, model: Model, optimizer: Any, schedule: Any) -> None:
        """Write the state after a step."""
        self.store.flush()  # first: features that are computed again, among others, may differ in the last bit
        state = replace(
            self.state,
            step=step,
            model=model.trained_state(),
            optimizer=optimizer_state(optimizer),
            random=random_states(),
            schedule=schedule.state_dict(),
            rates=[group["lr"] for group in optimizer.param_groups],
        )
        write_kept(state, self.folder, self.stage.keep_checkpoints)
        self._last = time.monotonic()


def write_kept(state: TrainingState, folder: Path, number: int) -> None:
    """Write a state to a run's folder and remove all but the last ``number`` checkpoints; the main process does.

    Raises:
        MLLMError: the folder cannot be written; the checkpoints that were there before are still there.
    """
    state.write(folder)
    if not state.writes:
        return
    if number > 1:
        _link(folder / NAME, folder / f"checkpoint-{state.stage}-{state.step}.safetensors")
    remove_kept(folder, all_but=number if number > 1 else 0)


def remove_kept(folder: Path, *, all_but: int = 0) -> None:
    """Remove all but the last checkpoints that have names of their own."""
    kept = sorted(_kept(folder), key=_place)
    for path in kept[: max(0, len(kept) - all_but)]:
        path.unlink(missing_ok=True)


def located(resume: Path) -> tuple[Path, Path | None]:
    """Return the run to resume, and the checkpoint of it to go back to; None: its last one.

    Args:
        resume: a run's folder, or the file of one of its checkpoints.

    Raises:
        MLLMError: the run has no such checkpoint.
    """
    if resume.name == NAME:
        return resume.parent, None
    if not _KEPT.fullmatch(resume.name):
        return resume, None
    if not os.path.isfile(resume):
        names = ", ".join(path.name for path in sorted(_kept(resume.parent), key=_place)) or "none"
        raise MLLMError(f"There is no checkpoint {str(resume)[:200]}. Those that are kept there: {names}.")
    return resume.parent, resume


def go_back(checkpoint: Path) -> None:
    """Make an earlier checkpoint the last one of its run, and remove those after it."""
    _link(checkpoint, checkpoint.parent / NAME)
    for path in _kept(checkpoint.parent):
        if _place(path) > _place(checkpoint):
            path.unlink(missing_ok=True)


def _kept(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*.safetensors") if _KEPT.fullmatch(path.name)]


def _place(checkpoint: Path) -> tuple[int, int]:
    """Return the stage and the step of a checkpoint, by its name."""
    match = _KEPT.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1]), int(match[2])


def _link(path: Path, name: Path) -> None:
    """Give a file a second name, which may be another file's until then; a copy where a file has one name only.

    Raises:
        MLLMError: the folder cannot be written.
    """

    def place(beside: Path) -> None:
        beside.unlink()
        try:
            os.link(path, beside)
        except OSError:  # a file system without links
            shutil.copyfile(path, beside)

    try:
        write(name, place)
    except OSError as error:
        raise MLLMError(f"{name} cannot be written: {error.strerror or error}. Free some disk space.") from error
