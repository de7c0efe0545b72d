"""Train a recipe: its stages in order, each by gradient (`mllm.training.loop`) or in closed form (`mllm.fits`).

Notable: the model may differ from stage to stage; trained tensors are carried over. What a stage does not name is
hashed before and after.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, set_seed

from mllm.assembly import Assembly
from mllm.build import build
from mllm.config import loading
from mllm.config.recipe import Recipe
from mllm.devices import DeviceName, use_device
from mllm.errors import MLLMError
from mllm.processes import in_main_process, processes
from mllm.saving import STAGES, check_fingerprints, fingerprints_of, save
from mllm.training.checkpoint import NAME as CHECKPOINT
from mllm.training.checkpoint import TrainingState, explain_misfit, random_states, set_random_states
from mllm.training.guides import assembly_of
from mllm.training.kept import go_back, located, remove_kept, write_kept
from mllm.training.needs import missing
from mllm.training.run import Run, free_folder
from mllm.training.setup import computing_type
from mllm.training.sharding import loading_device
from mllm.training.signals import Interrupted
from mllm.training.stages import begin_stage, run_stage


def train(
    recipe: str,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    accept_changes: bool = False,
    device: DeviceName | None = None,
) -> Run:
    """Train a recipe and return its run.

    Args:
        recipe: a recipe's name, or a path to a YAML file.
        overrides: dotted, ``{"connector.type": "mlp"}`` or ``["connector.type=mlp"]``.
        out: the run's folder; None: ``runs/NAME``, or the first free ``runs/NAME-2``, ...
        resume: a run that was interrupted, to continue from its last checkpoint; or the file of an earlier checkpoint
            in its folder, where ``keep_checkpoints`` kept it: later ones are removed.
        accept_changes: continue although the recipe is not the one that the run was started with.
        device: where this process computes from now on (``cuda``, ``cuda:1``, ``mps``, ``cpu``); None: a GPU where
            there is one, or the device that the launcher gave it.

    Runs that the recipe needs and that are not there are trained first; `mllm check` tells before whether it fits them.

    Raises:
        MLLMError: a recipe, part or data set that is wrong; nothing is trained then. Or a run that cannot be resumed.
        Interrupted: a signal stopped it.
    """
    config = loading.load(recipe, overrides)
    folder, checkpoint = located(Path(resume)) if resume else (Path(), None)
    config = loading.continued(config, folder / "recipe.yaml") if resume else config
    if not config.stages:
        raise MLLMError(f"The recipe {config.name} has no stages, so there is nothing to train.")
    processes()  # first: they agree on a folder before anything is trained
    use_device(device)
    train_needs(config)
    started = time.monotonic()
    set_seed(config.seed + processes().process_index)  # of several processes each has its own dropout
    model = None
    if resume:
        run = Run.reopen(folder, config, accept=accept_changes)
    else:
        spec = assembly_of(config.stages[0])
        model = build(
            spec, device=loading_device(), computes=computing_type(config.stages)
        )  # first: what does not fit leaves no folder
        run = Run.create(_folder(out, config.name), config)
    with contextlib.closing(run), run.signals:
        try:
            if checkpoint is not None:
                in_main_process(partial(go_back, checkpoint))
            _train(run, config, model, started)
        except Interrupted:
            raise
        except KeyboardInterrupt:
            raise run.signals.interrupted(run.path, "between two checkpoints") from None
    return run


def train_needs(config: Recipe) -> None:
    """Train the runs that a recipe stands on (``needs``) and that are not there yet; continue those not finished.

    Raises:
        MLLMError: needs that do not exist or go in a circle, or a needed recipe that is wrong.
    """
    (needs,) = broadcast_object_list([missing(config)])  # of the main process: the others may look later
    for need in needs:
        train(need.recipe, **{"resume" if need.started else "out": need.folder})


def _train(run: Run, config: Recipe, model: Assembly | None, started: float) -> None:
    """Run the stages, and save the result.

    Args:
        run: the run.
        config: its recipe.
        model: of the first stage; None: continue from the run's last checkpoint.
        started: the time when the run was last started.
    """
    model, state = _restored(run, config) if model is None else (model, TrainingState())
    with _plotted(run):
        for number, stage in enumerate(config.stages[state.stage :], start=state.stage):
            if not state.step:
                model = begin_stage(run, model, stage, config.seed, computing_type(config.stages))
            run_stage(run, model, stage, state)
            state = TrainingState(
                number + 1,
                model=model.trained_state(),
                random=random_states(),
                frozen=state.frozen,
                fingerprints=state.fingerprints,
            )
            if run.writes and number + 1 < len(config.stages):
                save(model, run.path / STAGES / stage.name)
            write_kept(state, run.path, stage.keep_checkpoints)
            if run.signals.received_anywhere() and number + 1 < len(config.stages):
                raise run.signals.interrupted(run.path, f"after stage {stage.name}; the checkpoint is written")
    run.record("frozen.json", state.frozen)
    run.record("time.json", {"minutes": (time.monotonic() - started) / 60})
    if run.writes:
        save(model, run.path / "model")
        (run.path / CHECKPOINT).unlink(missing_ok=True)
        remove_kept(run.path)
    processes().wait_for_everyone()


@contextlib.contextmanager
def _plotted(run: Run) -> Iterator[None]:
    """Draw the losses at the end; after an error, one of the drawing does not hide it."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            run.plot()
        raise
    run.plot()


def _folder(out: str | Path | None, name: str) -> Path:
    """Return the new run's folder: the same in all processes."""
    return Path(broadcast_object_list([str(out or free_folder(name))])[0])


def _restored(run: Run, config: Recipe) -> tuple[Assembly, TrainingState]:
    """Return the model and the state of a run's last checkpoint, with the random states and the log set back to it."""
    state = TrainingState.read(run.path) or TrainingState()
    names = [stage.name for stage in config.stages]
    run.rewind(names[: state.stage], names[state.stage] if state.stage < len(names) else "", state.step)
    number = state.stage if state.step or not state.stage else state.stage - 1  # a stage's end has that stage's model
    if number >= len(names):
        raise MLLMError(
            f"The checkpoint of {run.path} is of stage {number + 1}, and the recipe has {len(names)} stages."
        )
    computes = computing_type(config.stages)
    model = build(assembly_of(config.stages[number]), device=loading_device(), computes=computes)
    if state.random:  # there is a checkpoint
        if state.model.keys() != model.trained_state().keys():
            raise MLLMError(f"The checkpoint of {run.path} is of another model: the recipe's parts changed.")
        if state.fingerprints:  # an earlier version wrote none
            here = fingerprints_of(model)
            check_fingerprints(run.path, state.fingerprints, here, instead="start a new run with this one")
        with explain_misfit():
            model.load_state_dict(state.model, strict=False)
            wrote, here = set_random_states(state.random), processes().num_processes
        if wrote != here:  # batches are divided among them anew: sums differ in their last bits, and so does dropout
            run.log(stage="", step=state.step, processes_before=wrote, processes=here)
        model.calibrated = any(stage.sets("connector") for stage in config.stages[: number + 1])
    return model, state
