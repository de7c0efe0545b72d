"""Run one stage of a recipe: take its model over from the stage before, then fit or train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch import nn

from mllm.assembly import Assembly
from mllm.build import build_encoder, build_lm, join
from mllm.config.parts import PARTS, AssemblySpec
from mllm.config.recipe import Stage
from mllm.data.epochs import with_steps
from mllm.data.skipping import Skipped
from mllm.data.sources import fingerprint
from mllm.data.stream import Stream
from mllm.devices import choose_device
from mllm.encoders.feature_store import FeatureStore, open_store
from mllm.errors import MLLMError
from mllm.fits.base import Material
from mllm.fits.build import fit_of
from mllm.media.images import open_image
from mllm.processes import processes, progress
from mllm.saving import check_fingerprints, fingerprints_of
from mllm.system import return_memory
from mllm.training.batches import Batches, check_augmentation, check_packing, training_sources
from mllm.training.calibration import calibrate_new
from mllm.training.checkpoint import TrainingState
from mllm.training.guides import assembly_of, check_answers, guide_hashes, open_guides, problems_of
from mllm.training.kept import Checkpoints
from mllm.training.loop import Loop
from mllm.training.monitor import Monitor, shown_items
from mllm.training.run import Run
from mllm.training.setup import Objectives, accelerator_for, engine_for, parameter_groups
from mllm.training.sharding import divide_where_asked, divided, loading_device
from mllm.training.texts import check_texts, collect_texts
from mllm.training.throughput import Throughput
from mllm.training.trackers import start_trackers
from mllm.training.validation import Validation, validation_rows
from mllm.transfer import complete, transfer

MEASURES = {"explained": "R^2 on held-out rows"}  # how a fit's figure is called in the progress bar


def begin_stage(run: Run, model: Assembly, stage: Stage, seed: int, computes: torch.dtype | None = None) -> Assembly:
    """Return the model that a stage starts with: that of the stage before, with parts of another run where named.

    A stage whose own seed is not the recipe's (``seed``) starts torch's generators anew, for dropout above all.
    ``computes`` is as for `mllm.build.build`.
    """
    if stage.seed != seed:
        set_seed(stage.seed + processes().process_index)
    model = carry_over(model, assembly_of(stage), run, computes)
    if stage.init.source:
        transfer(model, Path(stage.init.source), stage.init.parts)
    return model


def carry_over(
    model: Assembly, spec: AssemblySpec, run: Run | None = None, computes: torch.dtype | None = None
) -> Assembly:
    """Return the model of the next stage: trained tensors are carried over by name, new ones are initialized.

    Args:
        model: of the stage before.
        spec: what the next stage's model is built from.
        run: logs the tensors that are left behind.
        computes: as for `mllm.build.build`.

    Raises:
        MLLMError: a trained tensor has another shape in the next stage.
    """
    if spec == model.spec:
        return model
    same = {
        part: getattr(spec, part) == getattr(model.spec, part) and spec.trains(part) == model.spec.trains(part)
        for part in PARTS
    }
    if all(same.values()):
        model.spec = spec
        return model
    touched = model.spec.adapters or model.tokens is not None or model.spec.trained or divided(model.lm)
    pristine = same["lm"] and not touched
    device = loading_device()
    encoder = model.encoder if same["encoder"] else build_encoder(spec, device=device)
    lm = model.lm if pristine else build_lm(spec, device=device, computes=computes)
    new = join(spec, encoder=encoder, lm=lm, device=device)
    old, wanted = model.trained_state(), new.trained_state()
    wrong = [name for name in old.keys() & wanted.keys() if old[name].shape != wanted[name].shape]
    if wrong:
        raise MLLMError(
            f"A stage changes parts so that trained tensors do not fit: {', '.join(sorted(wrong)[:4])}. "
            "Give the connector a fixed number of tokens, or leave the part as it was."
        )
    new.load_state_dict({name: tensor for name, tensor in old.items() if name in wanted}, strict=False)
    new.calibrated = complete(wanted, old)
    left = sorted(name for name in old if name not in wanted)
    if run and left:
        run.log(stage="", left_behind=left)
    return new


def run_stage(run: Run, model: Assembly, stage: Stage, state: TrainingState) -> None:
    """Fit or train one stage, and record that what it does not train hashes the same afterwards."""
    return_memory()  # of loading and of the stage before
    guides = _opened(run, model, stage, state)
    state.fingerprints = {**fingerprints_of(model), **guide_hashes(guides)}
    check_texts(stage, model)
    store = open_store(model, stage.feature_cache)
    collect_texts(model, stage, store)
    trained = [stage.fit.part] if stage.fit else list(stage.train)
    before = {**_hashes(model, trained), **guide_hashes(guides)}
    if stage.fit:
        _fit(run, model, stage, store)
    else:
        prepare(run, model, stage, store, state)()
    after = {**_hashes(model, trained), **guide_hashes(guides)}
    state.frozen[stage.name] = {"before": before, "after": after}
    assert before == after, "a frozen part changed"
    store.flush()


def _opened(run: Run, model: Assembly, stage: Stage, state: TrainingState) -> dict[str, nn.Module]:
    """Open the guides that a stage asks, and compare them with those that it was begun with, if it continues.

    Raises:
        MLLMError: a guide that is not there, cannot do what is asked of it, or is another one.
    """
    check_answers(stage)
    open_guides(model, stage)
    guides = dict(model.guides.opened)
    if state.step:
        check_fingerprints(run.path, state.fingerprints, guide_hashes(guides), instead="start a new run with this one")
    for problem in problems_of(model, stage):
        raise MLLMError(f"Stage {stage.name}: {problem}")
    return guides


def prepare(run: Run, model: Assembly, stage: Stage, store: FeatureStore, state: TrainingState) -> Loop:
    """Build what a stage trains with, in the order in which one thing needs another; return the loop.

    Args:
        run: where it is logged.
        model: the assembly, as the stage starts or continues with it.
        stage: what trains, on which data, by which objectives.
        store: of the encoder's features.
        state: the step to continue from.
    """
    accelerator = accelerator_for(stage, run.path)
    groups = parameter_groups(model, stage)
    if layers := divide_where_asked(model, stage, accelerator.device):
        run.log(stage=stage.name, step=state.step, divided_layers=layers)
    model.to(accelerator.device)
    model.guides.to(accelerator.device)
    sources = training_sources(stage)
    stage = with_steps(stage, sources)
    share = {"rank": accelerator.process_index, "world": accelerator.num_processes}
    objectives = Objectives(stage)
    batches = Batches(model, stage, sources, store, run.log, solved=objectives.read_prompts, **share)
    objectives.read_data(model, sources)
    check_packing(stage, model, objectives)
    check_augmentation(stage, model)
    run.note_data(stage.name, fingerprint(sources), resumed=state.step > 0)
    validation = Validation(model, stage, validation_rows(stage, model), store, objectives, state)
    start_trackers(accelerator, stage, run.path)
    monitor = Monitor(run, model, stage, accelerator, shown_items(stage))
    calibrate_new(model, stage, batches, store)
    engine = engine_for(accelerator, model, stage, groups, state)
    checkpoints = Checkpoints(run.path, state, store, stage)
    throughput = Throughput(model, stage)
    return Loop(stage, engine, objectives, batches, validation, monitor, checkpoints, run.signals, throughput)


def _hashes(model: Assembly, trained: Sequence[str]) -> dict[str, str]:
    """Return the hash of every part that has tensors a stage does not train."""
    parts = [name for name in PARTS if name not in trained and getattr(model, name) is not None]
    return {name: model.frozen_hash(name, trained) for name in parts if getattr(model, name).state_dict()}


def _fit(run: Run, model: Assembly, stage: Stage, store: FeatureStore) -> None:
    assert stage.fit is not None
    fit = fit_of(stage)
    model.to(choose_device())
    model.guides.to(choose_device())
    with progress() as bar:
        task = bar.add_task(stage.name, total=None, note="")
        material = _material(run, model, stage, store)
        quality = fit(model, replace(material, track=lambda chunks: bar.track(chunks, task_id=task)))
        bar.update(task, note=f"{MEASURES.get(fit.measure, fit.measure)} {quality:.2f}")
    run.log(stage=stage.name, **{fit.measure: quality})
    model.calibrated = model.calibrated or stage.fit.part == "connector"


def _material(run: Run, model: Assembly, stage: Stage, store: FeatureStore) -> Material:
    """Return the data on which a stage's part is fitted."""
    assert stage.fit is not None
    if stage.fit.targets == "tokens":  # their strings: no data is needed
        return Material(seed=stage.seed)
    sources = training_sources(stage)
    items = [item for source in sources for item in source.items]
    skipped = Skipped(stage.data.skip, len(items), partial(run.log, stage=stage.name))
    opened = model.encoder.open if model.encoder is not None else open_image
    return Material(
        items,
        features=store.whole,
        examples=lambda: Stream(sources, stage.prompt, seed=stage.seed, lm=model.lm).take(len(items)),  # each once
        readable=lambda part: skipped.readable(part, lambda item: opened(item.images[0])),
        seed=stage.seed,
    )
