"""Run one stage of a recipe: prepare what it needs, then fit or train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from mllm.build import build_encoder, build_lm, fit_of, join
from mllm.config.parts import PARTS, AssemblySpec
from mllm.config.recipe import Recipe, Stage
from mllm.data.skipping import Skipped
from mllm.data.stream import Stream
from mllm.encoders.feature_store import FeatureStore, open_store
from mllm.errors import MLLMError
from mllm.fits.base import Material
from mllm.media.images import open_image
from mllm.model import Model
from mllm.processes import progress
from mllm.system import return_memory
from mllm.training.batches import data
from mllm.training.checkpoint import State
from mllm.training.loop import Loop
from mllm.training.run import Run
from mllm.training.sharding import divided


def carried(model: Model, spec: AssemblySpec, run: Run | None = None) -> Model:
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


def run_stage(run: Run, model: Model, stage: Stage, config: Recipe, state: State) -> Model:
    """Fit or train one stage, and record that what it does not train hashes the same afterwards."""
    return_memory()  # what loading and the stage before left
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


def sets_connector(stage: Stage) -> bool:
    """Whether a stage fits the connector, trains in it, or starts from another run's."""
    taken = stage.init.parts or ["connector"] if stage.init.source else []
    paths = [stage.fit.part] if stage.fit else [*stage.train]
    return any(path.split(".")[0] == "connector" for path in (*paths, *taken))


def _encoder_trains(stage: Stage) -> bool:
    return any(path.split(".")[0] == "encoder" for path in stage.train)


def _hashes(model: Model, trained: Sequence[str]) -> dict[str, str]:
    """Return the hash of every part that has tensors a stage does not train."""
    parts = [name for name in PARTS if name not in trained and getattr(model, name) is not None]
    return {name: model.frozen_hash(name, trained) for name in parts if getattr(model, name).state_dict()}


def _fit(run: Run, model: Model, stage: Stage, config: Recipe, store: FeatureStore) -> None:
    assert stage.fit is not None
    fit = fit_of(stage)
    with progress() as bar:
        task = bar.add_task(stage.name, total=None, note="")
        material = _material(run, model, stage, config, store)
        found = fit(model, replace(material, track=lambda chunks: bar.track(chunks, task_id=task)))
        bar.update(task, note=f"{fit.measure} {found:.0%}")
    run.log(stage=stage.name, **{fit.measure: found})
    model.calibrated = model.calibrated or stage.fit.part == "connector"


def _material(run: Run, model: Model, stage: Stage, config: Recipe, store: FeatureStore) -> Material:
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
