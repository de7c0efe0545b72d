"""The training loop: the one there is. Stages, objectives and parts vary; the loop does not.

Notable: the loss of a step is the sum over all target tokens divided by their number, over accumulated batches and
processes alike, so how a batch is split changes nothing. What a stage does not name is hashed before and after.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import get_scheduler

from mllm import recipe as recipes
from mllm.checkpoint import save
from mllm.data.loading import Source, read_all
from mllm.data.skipping import Skipped
from mllm.data.stream import Stream
from mllm.errors import MLLMError
from mllm.features import FeatureStore, open_store
from mllm.fit import fit_connector
from mllm.images import open_image
from mllm.model import FROZEN, Assembly, build, calibrate, trained_module
from mllm.prompt import Batch, Piece, collate, images_of
from mllm.registry import lookup
from mllm.resume import NAME as CHECKPOINT
from mllm.resume import State, optimizer_tensors, random_states, set_optimizer, set_random_states
from mllm.run import Run, free_folder
from mllm.spec import Recipe, Stage

VALIDATION_ITEMS = 256
CALIBRATION_EXAMPLES = 32


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
    if config.changed_parts():
        changed = ", ".join(config.changed_parts())
        raise MLLMError(f"This version builds the model once, and stages change it: {changed}. Take that out.")
    set_seed(config.seed)
    model = build(config.assembly(config.stages[0]))
    if resume:
        run = Run.reopen(Path(resume), recipes.dump(config), accept=accept_changes)
    else:
        run = Run.create(Path(out) if out else free_folder(config.name), recipes.dump(config))
    state = _taken_up(run, model, config) if resume else State()
    try:
        for index in range(state.stage, len(config.stages)):
            stage = config.stages[index]
            store = open_store(model, stage.cache)
            before = _hashes(model)
            _fit(run, model, stage, config, store) if stage.fit else _train(run, model, stage, config, store, state)
            state.frozen[stage.name] = {"before": before, "after": _hashes(model)}
            assert before == state.frozen[stage.name]["after"], "a frozen part changed"
            store.flush()
            state = State(index + 1, tensors={**_trained(model), **random_states()}, frozen=state.frozen)
            state.write(run.path)
    finally:
        run.plot()
    run.record("frozen.json", state.frozen)
    save(model, run.path / "model")
    (run.path / CHECKPOINT).unlink(missing_ok=True)
    return run


def _taken_up(run: Run, model: Assembly, config: Recipe) -> State:
    """Put a model and the random states back to a run's last checkpoint, and the log with them."""
    state = State.read(run.path) or State()
    names = [stage.name for stage in config.stages]
    run.rewind(names[: state.stage], names[state.stage] if state.stage < len(names) else "", state.step)
    if state.tensors:
        trained = {name.removeprefix("model."): t for name, t in state.tensors.items() if name.startswith("model.")}
        if trained.keys() != model.trained_state().keys():
            raise MLLMError(f"The checkpoint of {run.path} is of another model: the recipe's parts changed.")
        model.load_state_dict(trained, strict=False)
        model.calibrated = True
        set_random_states(state.tensors)
    return state


def _trained(model: Assembly) -> dict[str, Tensor]:
    return {f"model.{name}": tensor for name, tensor in model.trained_state().items()}


def progress() -> Progress:
    """Return the progress bar of long work: what, how far, how long still, and the latest figures."""
    return Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )


def _fit(run: Run, model: Assembly, stage: Stage, config: Recipe, store: FeatureStore) -> None:
    assert stage.fit is not None
    items = [item for source in _data(stage, config.seed) for item in source.items]
    skipped = Skipped(stage.data.skip, len(items), partial(run.log, stage=stage.name))
    with progress() as bar:
        task = bar.add_task(stage.name, total=None, note="")
        track = lambda chunks: bar.track(chunks, task_id=task)  # noqa: E731
        explained = fit_connector(
            model,
            items,
            store,
            solver=stage.fit.solver,
            strength=stage.fit.strength,
            readable=lambda part: skipped.readable(part, lambda item: item.images[0].open()),
            track=track,
        )
        bar.update(task, note=f"explains {explained:.0%} of the words")
    run.log(stage=stage.name, explained=explained)
    model.calibrated = True


def _train(run: Run, model: Assembly, stage: Stage, config: Recipe, store: FeatureStore, state: State) -> None:
    """Train one stage, from ``state.step`` on, which goes on with it."""
    assert stage.steps is not None
    accelerator = Accelerator(mixed_precision=_precision(stage))
    model.to(accelerator.device)
    sources = _data(stage, config.seed)
    stream = _stream(sources, stage, model, config.seed)
    total = sum(len(source.items) for source in sources)
    skipped = Skipped(stage.data.skip, total, partial(run.log, stage=stage.name))
    if not model.calibrated:
        first = _stream(sources, stage, model, config.seed).take(CALIBRATION_EXAMPLES)
        features, _ = _readable(model, first, store, accelerator.device, skipped)
        if features is not None:
            calibrate(model, features)
        model.calibrated = True
    optimizer = torch.optim.AdamW(_groups(model, stage), weight_decay=stage.optim.weight_decay, betas=stage.optim.betas)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    schedule = get_scheduler(_schedule(stage), optimizer, stage.optim.warmup, stage.steps)
    if state.step:
        set_optimizer(optimizer, state.tensors, state.rates)
        schedule.load_state_dict(state.schedule)
        stream.skip(state.step * stage.optim.accumulate, stage.batch_size)
    objectives = [lookup("objectives", spec.type) for spec in stage.objectives]
    weights = [spec.weight for spec in stage.objectives]
    validation = _validation(stage, model.lm)
    started = time.monotonic()
    with progress() as bar:
        task = bar.add_task(stage.name, total=stage.steps, completed=state.step, note="")
        for step in range(state.step + 1, stage.steps + 1):
            model.train()
            share = {"rank": accelerator.process_index, "world": accelerator.num_processes}
            micro = [stream.take(stage.batch_size, **share) for _ in range(stage.optim.accumulate)]
            prepared = [_readable(model, rows, store, accelerator.device, skipped) for rows in micro]
            loss = _step(accelerator, wrapped, optimizer, prepared, objectives, weights, stage.optim.clip)
            rate = optimizer.param_groups[0]["lr"]
            schedule.step()
            if not torch.isfinite(torch.tensor(loss)):
                raise MLLMError(f"The loss is {loss} at step {step} of {stage.name}. Lower the learning rate.")
            speed = (step - state.step) * stage.batch_size * stage.optim.accumulate / (time.monotonic() - started)
            bar.update(task, advance=1, note=f"loss {loss:.3f}  {speed:.1f} examples/s")
            run.log(stage=stage.name, step=step, loss=loss, lr=rate)
            if validation and (step == stage.steps or (stage.validate_every and step % stage.validate_every == 0)):
                run.log(stage=stage.name, step=step, val_loss=validate(model, validation, store))
            if step % stage.checkpoint_every == 0 and step < stage.steps:
                store.flush()  # first: features that are computed again, among others, may differ in the last bit
                tensors = {**_trained(model), **optimizer_tensors(optimizer), **random_states()}
                rates = [group["lr"] for group in optimizer.param_groups]
                State(state.stage, step, tensors, schedule.state_dict(), rates, state.frozen).write(run.path)
    model.eval()


def _step(
    accelerator: Accelerator,
    wrapped: nn.Module,
    optimizer: Any,
    prepared: Sequence[tuple[Tensor | None, Batch]],
    objectives: Sequence[Any],
    weights: Sequence[float],
    clip: float | None,
) -> float:
    """Do one optimizer step over accumulated batches; return the mean loss over target tokens."""
    model: Assembly = accelerator.unwrap_model(wrapped)
    targets = torch.tensor(
        float(sum(int((batch.labels >= 0).sum()) for _, batch in prepared)), device=accelerator.device
    )
    share = accelerator.num_processes / accelerator.reduce(targets).clamp(
        min=1
    )  # gradients are averaged over processes
    total = torch.zeros((), device=accelerator.device)
    for index, (features, batch) in enumerate(prepared):
        last = index == len(prepared) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(wrapped):
            with accelerator.autocast():
                losses = wrapped(features, batch, objectives)
            loss = sum(weight * value for weight, (value, _) in zip(weights, losses, strict=True))
            accelerator.backward(loss * share)
            total += loss.detach() * share
    if clip is not None:
        accelerator.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
    optimizer.step()
    optimizer.zero_grad()
    return float(accelerator.reduce(total, "mean"))


@torch.no_grad()
def validate(model: Assembly, rows: Sequence[list[Piece]], store: FeatureStore, *, size: int = 32) -> float:
    """Return the mean negative log-likelihood of the target tokens of examples."""
    model.eval()
    caption = lookup("objectives", "caption")
    loss, count = 0.0, 0
    for start in range(0, len(rows), size):
        features, batch = _inputs(model, rows[start : start + size], store, model.device)
        ((value, number),) = model(features, batch, [caption])
        loss, count = loss + float(value), count + number
    return loss / max(count, 1)


def _inputs(
    model: Assembly, rows: Sequence[list[Piece]], store: FeatureStore, device: torch.device
) -> tuple[Tensor | None, Batch]:
    """Return features ``(I, P, D_vis)`` and the padded batch of examples."""
    images = [image for pieces in rows for image in images_of(pieces)]
    batch = collate([model.encode(pieces) for pieces in rows], model.lm.pad).to(device)
    return (store(images).to(device) if images else None), batch


def _readable(
    model: Assembly, rows: Sequence[list[Piece]], store: FeatureStore, device: torch.device, skipped: Skipped
) -> tuple[Tensor | None, Batch]:
    """Return a batch's inputs, without the examples that cannot be read or do not fit: they are looked for on failure.

    What is left weighs by its tokens, as ever; and a run that is resumed passes over the same examples.
    """

    def read(pieces: list[Piece]) -> None:
        model.encode(pieces)
        for image in images_of(pieces):
            model.encoder.open(image)

    try:
        return _inputs(model, rows, store, device)
    except MLLMError:
        return _inputs(model, skipped.readable(rows, read), store, device)


def _data(stage: Stage, seed: int) -> list[Source]:
    sources = read_all(stage.data.train, seed=seed)
    if not sources:
        raise MLLMError(f"Stage {stage.name} has no data: give data.train.")
    return sources


def _stream(sources: Sequence[Source], stage: Stage, model: Assembly, seed: int) -> Stream:
    options = {"lm": model.lm, "num_visual": model.connector.num_tokens, "data": stage.data}
    return Stream(sources, stage.prompt, seed=seed, **options)


def _validation(stage: Stage, lm: Any) -> list[list[Piece]]:
    sources = read_all(stage.data.val)
    number = min(VALIDATION_ITEMS, sum(len(source.items) for source in sources))
    rows = Stream(sources, stage.prompt, seed=0, lm=lm).take(number) if sources else []
    for image in (image for pieces in rows for image in images_of(pieces)):
        open_image(image)  # one that cannot be read is found now, not after hours
    return rows


def _groups(model: Assembly, stage: Stage) -> list[dict[str, Any]]:
    """Return the optimizer's groups: each part (or path inside one) that trains, with its learning rate."""
    model.requires_grad_(False)
    modules = {path: trained_module(model, path) for path in stage.train}
    return [
        {"params": list(module.requires_grad_(True).parameters()), "lr": stage.train[path]}
        for path, module in modules.items()
    ]


def _hashes(model: Assembly) -> dict[str, str]:
    return {name: model.frozen_hash(name) for name in FROZEN}


def _precision(stage: Stage) -> str:
    """Return accelerate's word; ``auto`` is bfloat16 on a GPU that has it, else what the parts are loaded in."""
    names = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
    if stage.optim.precision == "auto":
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    return names[stage.optim.precision]


def _schedule(stage: Stage) -> str:
    return "constant_with_warmup" if stage.optim.schedule == "constant" else stage.optim.schedule
