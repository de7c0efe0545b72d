"""Measure a few real steps of a recipe on the device of this machine, with real weights."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from mllm.build import build
from mllm.config import loading
from mllm.config.recipe import Stage
from mllm.errors import MLLMError
from mllm.media.images import ImageSource
from mllm.planning.draft import Draft
from mllm.planning.workload import Rows, workload
from mllm.training.batches import parts
from mllm.training.guides import assembly_of, open_guides
from mllm.training.optimizers import optimizer_for
from mllm.training.setup import Objectives, parameter_groups, precision, recompute, set_up

REPEATS = 3
IMAGES = 8
SIDE = 512  # pixels of images of an encoder that takes any size


@dataclass(frozen=True)
class Measured:
    """What was measured on this machine's device, of one process.

    Attributes:
        stage: the stage of which a step was measured.
        device: its name.
        gpu: whether it is no CPU.
        rows: of the batch.
        length: of its longest row, in tokens.
        seconds: of a step on it.
        flops: FLOP/s of the step, what is recomputed included.
        encoder_flops: FLOP/s of the frozen encoder; None: there is none.
        peak: bytes allocated at once on a GPU, in a step on the largest batch; None: on a CPU.
        image_seconds: of a processor core, to open and preprocess an image of the data; None: there is none here.
    """

    stage: str
    device: str
    gpu: bool
    rows: int
    length: int
    seconds: float
    flops: float
    encoder_flops: float | None
    peak: int | None
    image_seconds: float | None


def probe(
    recipe: str,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    processes: int = 1,
    images: int | None = None,
    text: int | None = None,
) -> Measured:
    """Measure the last stage that trains by gradient, on this process's device, at the shape that is planned.

    The model is loaded. Features and pixels are noise: their values do not change the time.

    Args:
        recipe, overrides: as in training.
        processes: among which a batch is divided: the step is that of one of them.
        images, text: as in `mllm.planning.plan.Setting`.

    Raises:
        MLLMError: the recipe has no such stage, its parts cannot be loaded, or a step does not fit into memory.
    """
    config = loading.load(recipe, overrides)
    stage = next((stage for stage in reversed(config.stages) if stage.train), None)
    if stage is None:
        raise MLLMError(f"{config.name} has no stage that trains: there is no step to time.")
    accelerator = Accelerator(mixed_precision=precision(stage))
    device = accelerator.device
    model: Any = build(assembly_of(stage))
    open_guides(model, stage)
    load = workload(model, stage, processes=processes, images=images, text=text)
    draft = Draft(stage, "cpu" if device.type == "cpu" else "gpu")
    encoder = None
    pixels = _pixels(model).to(device) if model.encoder else None
    if pixels is not None and not model.encoder_trains and draft.image.flops:
        with torch.no_grad():
            seconds = _seconds(lambda: model.encoder(pixels), device)
        encoder = draft.image.flops / model.tiles_per_image * len(pixels) / seconds
    step = _step(model, stage, accelerator, pixels)
    try:
        peak = _peak(lambda: step(load.largest), device)
        seconds = _seconds(lambda: step(load.typical), device)
    except torch.OutOfMemoryError:
        raise MLLMError(
            f"A step of {len(load.largest.pieces)} rows of up to {load.largest.length} tokens does not fit into the "
            f"memory of {_name(device)}. See what fits: mllm plan {recipe} --device gpu --memory 80GiB"
        ) from None
    rows, length = len(load.typical.pieces), load.typical.length
    rate, image = draft.step(load.typical).flops / seconds, _image_seconds(model, load.typical)
    return Measured(stage.name, _name(device), device.type != "cpu", rows, length, seconds, rate, encoder, peak, image)


def _step(model: Any, stage: Stage, accelerator: Accelerator, pixels: torch.Tensor | None) -> Callable[[Rows], None]:
    """Return a function that does a step on a batch."""
    set_up(model, stage)
    optimizer = optimizer_for(stage.optim, parameter_groups(model, stage))
    objectives = Objectives(stage)
    with torch.no_grad():
        features = model.encoder(pixels)[:1] if pixels is not None else None
    if pixels is not None and model.encoder_trains:
        features = pixels[:1]
    model.train()
    if stage.optim.checkpointing:
        recompute(model)

    def step(rows: Rows) -> None:
        batch = rows.batch.to(accelerator.device) if rows.batch else None
        each = None
        if features is not None and rows.images:
            each = features.expand(model.tiles_of(rows.shown), *features.shape[1:])
        for micro in parts(model, objectives, (rows.pieces, each, batch)):
            with accelerator.autocast():
                losses = objectives(model, micro)
            losses.sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _pixels(model: Any) -> torch.Tensor:
    """Return the encoder's inputs of several images, of noise where they need no values of their own."""
    if model.joint:
        return torch.as_tensor(model.encoder.preprocess([Image.new("RGB", (SIDE, SIDE))] * IMAGES))
    return torch.randn(IMAGES, *model.encoder.shape)


def _image_seconds(model: Any, rows: Rows) -> float | None:
    """Return the seconds of a processor core for an image of the data; None: none can be opened."""
    sources = [image for image in rows.shown if isinstance(image, ImageSource)][:IMAGES] if model.encoder else []
    try:
        times = [_cpu_seconds(model.encoder, source) for source in sources]
    except MLLMError:
        return None
    return statistics.median(times) if times else None


def _cpu_seconds(encoder: Any, source: ImageSource) -> float:
    started = time.process_time()
    encoder.prepared(encoder.tiles(encoder.open(source)))
    return time.process_time() - started


def _peak(compute: Callable[[], Any], device: torch.device) -> int | None:
    """Return the most bytes that a computation has allocated on a GPU, with what was there before; None: on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    compute()
    return torch.cuda.max_memory_allocated(device)


def _seconds(compute: Callable[[], Any], device: torch.device) -> float:
    """Return the median time of a few runs after a first one that warms up."""
    times = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        compute()
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"
