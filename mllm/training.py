"""From a recipe to a run: its stages in order, each by gradient (`mllm.loop`) or in closed form (`mllm.fit`).

Notable: the model may differ from stage to stage; what was trained goes along. What a stage does not name is hashed
before and after.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, set_seed

from mllm import recipe as recipes
from mllm.assembling import build, build_encoder, build_lm, join
from mllm.checkpoint import save, take
from mllm.data.skipping import Skipped
from mllm.data.stream import Stream
from mllm.errors import MLLMError
from mllm.features import FeatureStore, open_store
from mllm.fit import Material, fit_of
from mllm.images import open_image
from mllm.lms.sharding import divided
from mllm.loop import Loop, data
from mllm.memory import give_back
from mllm.model import Assembly
from mllm.processes import processes
from mllm.progress import progress
from mllm.resume import NAME as CHECKPOINT
from mllm.resume import State, random_states, set_random_states
from mllm.run import Run, free_folder
from mllm.spec import PARTS, AssemblySpec, Recipe, Stage


def train(
    recipe: str,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    accept_changes: bool = False,
) -> Run:
    """Train a recipe and return its run.

    Args:
        recipe: a recipe's name, or a path to a YAML file.
        overrides: dotted, ``{"connector.type": "mlp"}`` or ``["connector.type=mlp"]``.
        out: the run's folder; None: ``runs/NAME``, or the first free ``runs/NAME-2``, ...
        resume: a run that was interrupted, to go on with from its last checkpoint.
        accept_changes: go on although the recipe is not the one the run was started with.

    Raises:
        MLLMError: a recipe, part or data set that is wrong; nothing is trained then. Or a run that cannot be resumed.
    """
    config = recipes.load(recipe, overrides)
    if not config.stages:
        raise MLLMError(f"The recipe {config.name} has no stages, so there is nothing to train.")
    started = time.monotonic()
    processes()  # first: they agree on a folder before anything is trained
    set_seed(config.seed)
    if resume:
        run = Run.reopen(Path(resume), recipes.dump(config), accept=accept_changes)
        model, state = _taken_up(run, config)
    else:
        model, state = build(config.assembly(config.stages[0])), State()  # first: what does not fit leaves no folder
        run = Run.create(_folder(out, config.name), recipes.dump(config))
    try:
        for index in range(state.stage, len(config.stages)):
            stage = config.stages[index]
            if index and not state.step:
                model = carried(model, config.assembly(stage), run)
            if stage.init.source and not state.step:
                take(model, Path(stage.init.source), stage.init.parts)
            model = _stage(run, model, stage, config, state)
            state = State(index + 1, tensors={**_trained(model), **random_states()}, frozen=state.frozen)
            state.write(run.path)
    finally:
        run.plot()
    run.record("frozen.json", state.frozen)
    run.record("time.json", {"minutes": (time.monotonic() - started) / 60})  # since it was last taken up
    if run.writes:
        save(model, run.path / "model")
        (run.path / CHECKPOINT).unlink(missing_ok=True)
    processes().wait_for_everyone()
    return run


def carried(model: Assembly, spec: AssemblySpec, run: Run | None = None) -> Assembly:
    """Return the model of the next stage: what was trained goes along by name, what is new starts anew.

    Args:
        model: the stage before's.
        spec: what the next stage's model is built from.
        run: is told what is left behind.

    Raises:
        MLLMError: a tensor that was trained has another shape in the next stage.
    """
    if spec == model.spec:
        return model
    same = {part: getattr(spec, part) == getattr(model.spec, part) for part in PARTS}
    if all(same.values()):
        model.spec = spec
        return model
    touched = model.spec.adapters or model.spec.tokens or model.spec.trained or divided(model.lm)
    pristine = same["lm"] and not touched
    encoder = model.encoder if same["encoder"] else build_encoder(spec)
    new = join(spec, encoder=encoder, lm=model.lm if pristine else build_lm(spec))
    old, wanted = model.trained_state(), new.trained_state()
    wrong = [name for name in old.keys() & wanted.keys() if old[name].shape != wanted[name].shape]
    if wrong:
        raise MLLMError(
            f"A stage changes parts so that what was trained does not fit: {', '.join(sorted(wrong)[:4])}. "
            "Give the connector a fixed number of tokens, or leave the part as it was."
        )
    new.load_state_dict({name: tensor for name, tensor in old.items() if name in wanted}, strict=False)
    new.calibrated = all(name in old for name in wanted if name.startswith("connector."))
    left = sorted(name for name in old if name not in wanted)
    if run and left:
        run.log(stage="", left_behind=left)
    return new


def _stage(run: Run, model: Assembly, stage: Stage, config: Recipe, state: State) -> Assembly:
    give_back()  # what loading and the stage before left
    store = open_store(model, "off" if _encoder_trains(stage) else stage.cache)
    trained = [stage.fit.part] if stage.fit else list(stage.train)
    before = _hashes(model, trained)
    if stage.fit:
        _fit(run, model, stage, config, store)
    else:
        Loop(run, model, stage, config, store, state)()
    state.frozen[stage.name] = {"before": before, "after": _hashes(model, trained)}
    assert before == state.frozen[stage.name]["after"], "a frozen part changed"
    store.flush()
    return model


def _folder(out: str | Path | None, name: str) -> Path:
    """Return the new run's folder: the same in all processes."""
    return Path(broadcast_object_list([str(out or free_folder(name))])[0])


def _taken_up(run: Run, config: Recipe) -> tuple[Assembly, State]:
    """Return the model and the state of a run's last checkpoint, and put the random states and the log back to it."""
    state = State.read(run.path) or State()
    names = [stage.name for stage in config.stages]
    run.rewind(names[: state.stage], names[state.stage] if state.stage < len(names) else "", state.step)
    at = state.stage if state.step or not state.stage else state.stage - 1  # a stage's end is the end of its own model
    model = build(config.assembly(config.stages[at]))
    if state.tensors:
        trained = {name.removeprefix("model."): t for name, t in state.tensors.items() if name.startswith("model.")}
        if trained.keys() != model.trained_state().keys():
            raise MLLMError(f"The checkpoint of {run.path} is of another model: the recipe's parts changed.")
        model.load_state_dict(trained, strict=False)
        model.calibrated = any(map(_sets_connector, config.stages[: at + 1]))
        set_random_states(state.tensors)
    return model, state


def _sets_connector(stage: Stage) -> bool:
    """Whether a stage fits the connector, trains in it, or starts from another run's."""
    taken = stage.init.parts or ["connector"] if stage.init.source else []
    paths = [stage.fit.part] if stage.fit else [*stage.train]
    return any(path.split(".")[0] == "connector" for path in (*paths, *taken))


def _trained(model: Assembly) -> dict[str, Any]:
    return {f"model.{name}": tensor for name, tensor in model.trained_state().items()}


def _encoder_trains(stage: Stage) -> bool:
    return any(path.split(".")[0] == "encoder" for path in stage.train)


def _hashes(model: Assembly, trained: Sequence[str]) -> dict[str, str]:
    """Return the hash of every part that has tensors a stage does not train."""
    parts = [name for name in PARTS if name not in trained and getattr(model, name) is not None]
    return {name: model.frozen_hash(name, trained) for name in parts if getattr(model, name).state_dict()}


def _fit(run: Run, model: Assembly, stage: Stage, config: Recipe, store: FeatureStore) -> None:
    assert stage.fit is not None
    fit = fit_of(stage.fit)
    with progress() as bar:
        task = bar.add_task(stage.name, total=None, note="")
        material = _material(run, model, stage, config, store)
        found = fit(model, replace(material, track=lambda chunks: bar.track(chunks, task_id=task)))
        bar.update(task, note=f"{fit.told} {found:.0%}")
    run.log(stage=stage.name, **{fit.told: found})
    model.calibrated = model.calibrated or stage.fit.part == "connector"


def _material(run: Run, model: Assembly, stage: Stage, config: Recipe, store: FeatureStore) -> Material:
    """Return what a stage's part is fitted on."""
    assert stage.fit is not None
    if stage.fit.targets == "tokens":  # their own strings: no data is needed, none need be given
        return Material(seed=config.seed)
    sources = data(stage, config.seed)
    items = [item for source in sources for item in source.items]
    skipped = Skipped(stage.data.skip, len(items), partial(run.log, stage=stage.name))
    opened = model.encoder.open if model.encoder is not None else open_image
    return Material(
        items,
        features=store,
        examples=lambda: Stream(sources, stage.prompt, seed=config.seed, lm=model.lm).take(len(items)),  # each once
        readable=lambda part: skipped.readable(part, lambda item: opened(item.images[0])),
        seed=config.seed,
    )
