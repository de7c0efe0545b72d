"""Measure the share of the machine's matrix-multiply peak that a step on cached features reaches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mllm.eval.bench.costs import shape_of
from mllm.eval.bench.setups import batch_of, captions, ours_losses, setup, source
from mllm.eval.bench.shapes import LM, noise_images, save_vision
from mllm.eval.bench.table import Row

from mllm.model import Model
from mllm.prompts.batch import Batch
from mllm.training.batches import rows_at_once, split

BATCH = 8
SIDE = 2048  # of the matrices whose product is the peak
WANTED = {"float32": 0.75, "bfloat16": 0.55}


def share(
    folder: Path,
    *,
    repeats: int,
    steps: int,
    progress: Callable[[str], None],
    size: dict[str, Any] | None = None,
    lm: str = LM,
    side: int = SIDE,
) -> list[Row]:
    """Compare the FLOP/s of steps of the LLaVA shape with those of products of square matrices."""
    vision = save_vision(folder / "encoder", size)
    annotations = captions(folder / "data", noise_images(BATCH))
    rows = []
    for dtype, wanted in WANTED.items():
        recipe = {
            "name": "bench",
            "encoder": {"model": vision, "layer": -1},
            "lm": {"model": lm, "dtype": dtype},
            "connector": {"type": "mlp"},
            "data": {"train": source(annotations)},
            "optim": {"precision": "float32"},
            "stages": [{"name": "align", "train": {"connector": 1e-3}, "steps": 1, "batch_size": BATCH}],
        }
        made, model = setup(folder / dtype, recipe, {"kind": "none", "processor": vision}, steps=1)
        step = _step(model, *batch_of(model, made, BATCH))
        product = _product(getattr(torch, dtype), side)
        reached, peak = [], []
        for _ in range(repeats + 1):  # in turns; the first turn is not counted
            peak.append(2 * side**3 / _seconds(product, 5))
            reached.append(BATCH * shape_of(model, made).step() / _seconds(step, steps))
        ratio = statistics.median(a / b for a, b in zip(reached[1:], peak[1:], strict=True))
        progress(f"{dtype}: {ratio:.0%} of the matrix-multiply peak")
        ours, best = statistics.median(reached[1:]) / 1e9, statistics.median(peak[1:]) / 1e9
        note = f"a cached step of the LLaVA shape, batch {BATCH}, next to products of {side} x {side}"
        rows.append(Row(f"share of the peak, {dtype}", "GFLOP/s", ours, best, ratio, wanted, 1.0, note))
        del model, step
    return rows


def _step(model: Model, features: torch.Tensor, batch: Batch) -> Callable[[], None]:
    """Return a step of the optimizer on this batch, in micro-batches as in training."""
    model.requires_grad_(False)
    size = rows_at_once(len(batch.ids), batch.ids.shape[1], model.lm.model.dtype)
    optimizer = torch.optim.AdamW(model.connector.requires_grad_(True).parameters(), lr=1e-3)

    def step() -> None:
        for _, some, part in split([[image] for image in features], features, batch, size=size):
            losses = ours_losses(model, some, part)
            (losses.sum() / len(batch.ids)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _product(dtype: torch.dtype, side: int) -> Callable[[], torch.Tensor]:
    a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
    return lambda: a @ b


def _seconds(work: Callable[[], Any], times: int) -> float:
    """Return the median time of a call."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
