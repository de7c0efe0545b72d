"""Compute the learning rate of each step: warmup, then cosine, linear, constant or step decay, down to a floor."""

from __future__ import annotations

import math
from bisect import bisect_right
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mllm.config.recipe import OptimSpec


def schedule_for(optimizer: Optimizer, optim: OptimSpec, steps: int) -> LambdaLR:
    """Return the schedule of a stage of ``steps`` steps, for the learning rates that the optimizer's groups have."""
    rates = [group["lr"] for group in optimizer.param_groups]
    return LambdaLR(optimizer, [partial(share, optim=optim, steps=steps, rate=rate) for rate in rates])


def share(step: int, *, optim: OptimSpec, steps: int, rate: float) -> float:
    """Return the learning rate after a number of steps, as a share of the group's ``rate``.

    ``floor`` and ``warmup_start`` are learning rates: a group whose own rate is lower keeps it.
    """
    if step < optim.warmup:
        start = _as_share(optim.warmup_start, rate)
        return start + (1 - start) * (step / optim.warmup)
    floor = _as_share(optim.floor, rate)
    return (
        max(floor, optim.factor ** bisect_right(optim.milestones, step))
        if optim.milestones
        else (floor + (1 - floor) * _decay(step, optim, optim.horizon or steps))
    )


def _decay(step: int, optim: OptimSpec, end: int) -> float:
    """Return how much of the learning rate above the floor is left: 1 after warmup, 0 at the end."""
    if optim.schedule == "constant":
        return 1.0
    length = max(1, end - optim.warmup)
    if optim.schedule == "linear":
        return max(0.0, (end - step) / length)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - optim.warmup) / length)))


def _as_share(value: float, rate: float) -> float:
    return min(1.0, value / rate) if rate else 1.0
