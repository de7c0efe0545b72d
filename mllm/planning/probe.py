"""Time a few real steps of a recipe on this machine, with real weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from mllm.build import build
from mllm.config import loading
from mllm.errors import MLLMError
from mllm.planning.draft import Draft
from mllm.planning.workload import workload
from mllm.training.batches import parts
from mllm.training.guides import assembly_of, open_guides
from mllm.training.optimizers import optimizer_for
from mllm.training.setup import Objectives, parameter_groups, precision, set_up

REPEATS = 3
IMAGES = 8
SIDE = 512  # pixels of images of an encoder that takes any size


def probe(recipe: str, overrides: Mapping[str, Any] | Sequence[str] = ()) -> tuple[float, float | None]:
    """Return the FLOP/s of a step of the last stage that trains by gradient, and the FLOP/s of its encoder.

    The model is loaded. Features and pixels are noise: their values do not change the time.

    Raises:
        MLLMError: the recipe has no such stage, or its parts cannot be loaded.
    """
    config = loading.load(recipe, overrides)
    stage = next((stage for stage in reversed(config.stages) if stage.train), None)
    if stage is None:
        raise MLLMError(f"{config.name} has no stage that trains: there is no step to time.")
    accelerator = Accelerator(mixed_precision=precision(stage))
    model: Any = build(assembly_of(stage))
    open_guides(model, stage)
    set_up(model, stage)
    optimizer = optimizer_for(stage.optim, parameter_groups(model, stage))
    objectives = Objectives(stage)
    rows = workload(model, stage, processes=1, images=None, text=None).typical
    draft = Draft(stage, "cpu" if accelerator.device.type == "cpu" else "gpu")
    pixels = _pixels(model).to(accelerator.device) if model.encoder else None
    with torch.no_grad():
        features = model.encoder(pixels)[:1] if pixels is not None else None
    batch = rows.batch.to(accelerator.device) if rows.batch else None
    model.train()

    def step() -> None:
        each = None
        if features is not None and rows.images:
            each = features.expand(model.tiles_of(rows.shown), *features.shape[1:])
        for micro in parts(model, objectives, (rows.pieces, each, batch)):
            with accelerator.autocast():
                losses = objectives(model, micro)
            losses.sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    rate = draft.step(rows).flops / _seconds(step)
    if pixels is None or model.encoder_trains or not draft.image.flops:
        return rate, None
    with torch.no_grad():
        return rate, draft.image.flops / model.tiles_per_image * len(pixels) / _seconds(lambda: model.encoder(pixels))


def _pixels(model: Any) -> torch.Tensor:
    """Return the encoder's inputs of several images, of noise where they need no values of their own."""
    if model.joint:
        return torch.as_tensor(model.encoder.preprocess([Image.new("RGB", (SIDE, SIDE))] * IMAGES))
    return torch.randn(IMAGES, *model.encoder.shape)


def _seconds(compute: Callable[[], Any]) -> float:
    """Return the median time of a few runs after a first one that warms up."""
    times = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        compute()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
