"""How fast this machine is at a recipe: a few real steps on real weights, timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from mllm.build import build, objectives_of
from mllm.config import loading as recipes
from mllm.errors import MLLMError
from mllm.planning.draft import Draft
from mllm.planning.workload import workload
from mllm.training.batches import parts
from mllm.training.setup import parameter_groups, precision, set_up

REPEATS = 3
PICTURES = 8


def probe(recipe: str, overrides: Mapping[str, Any] | Sequence[str] = ()) -> tuple[float, float | None]:
    """Return the FLOP/s that a step of the last stage with gradients reaches here, and those that its encoder does.

    The model is loaded. Features and pixels are noise: what they show costs nothing.

    Raises:
        MLLMError: the recipe has no such stage, or its parts cannot be loaded.
    """
    config = recipes.load(recipe, overrides)
    stage = next((stage for stage in reversed(config.stages) if stage.train), None)
    if stage is None:
        raise MLLMError(f"{config.name} has no stage that trains: there is no step to time.")
    accelerator = Accelerator(mixed_precision=precision(stage))
    model: Any = build(config.assembly(stage)).to(accelerator.device)
    groups = parameter_groups(model, stage)
    set_up(model, stage)
    load = workload(model, stage, config, processes=1, images=None, text=None)
    rows, objectives = load.typical, objectives_of(stage.objectives)
    optimizer = torch.optim.AdamW(groups)
    draft = Draft(stage, config, "cpu" if accelerator.device.type == "cpu" else "gpu")
    pixels = torch.randn(PICTURES, *model.encoder.shape, device=accelerator.device) if model.encoder else None
    features = model.encoder(pixels[:1]).detach() if pixels is not None else None
    batch = rows.batch.to(accelerator.device) if rows.batch else None
    model.train()

    def step() -> None:
        given = None if features is None or not rows.images else features.expand(rows.images, *features.shape[1:])
        for part in parts(model, objectives, (rows.pieces, given, batch)):
            with accelerator.autocast():
                losses = torch.stack(model(*part, objectives)).float()
            losses.sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    rate = draft.step(rows).flops / _seconds(step)
    if pixels is None or model.encoder_trains or not draft.picture.flops:
        return rate, None
    with torch.no_grad():
        return rate, draft.picture.flops * PICTURES / _seconds(lambda: model.encoder(pixels))


def _seconds(compute: Callable[[], Any]) -> float:
    """Return the median time of a few runs behind one that warms up."""
    times = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        compute()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
