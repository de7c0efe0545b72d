"""Advise what to change in a stage that does not fit into memory: the cheapest change first, as little as needed."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ByteSize

from mllm.config.recipe import Stage
from mllm.errors import MLLMError
from mllm.planning.draft import Draft
from mllm.planning.plan import Setting, plan_stage

LEAST = ByteSize(256 * 2**20)  # of cached features in memory: the others are read from disk
UNITS = {"": 1, "K": 1, "M": 2, "G": 3, "T": 4}


def bytes_of(text: str) -> int:
    """Return the bytes of a size such as ``24GiB``, ``24GB`` or ``24G`` (a G is a GiB).

    Raises:
        MLLMError: it is no size.
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?)(i?B|B)?\s*", text, flags=re.IGNORECASE)
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or number <= 0:
        raise MLLMError(f"{text!r} is no size: expected a number and a unit, for example 24GiB.")
    base = 1000 if (match[3] or "").upper() == "B" and match[2] else 1024
    return int(number * base ** (UNITS[match[2].upper()] if match[2] else 0))


def fitting(stage: Stage, number: int, setting: Setting, limit: int) -> list[str] | None:
    """Return overrides with which a stage takes no more than ``limit`` bytes.

    A smaller batch is accumulated, so that a step sees as many examples. After it come fewer features in memory (on a
    CPU), bfloat16 weights, activation checkpointing, 8-bit and 4-bit weights.

    Args:
        stage: the stage.
        number: its place in the recipe.
        setting: where it is to run.
        limit: bytes of a device.

    Returns:
        The overrides, none where the stage fits as it is; None where all of them are not enough.
    """
    changes: dict[str, Any] = {}
    for change in ({}, *_changes(stage, setting)):
        changes |= change
        size = _largest_batch(_with(stage, changes), setting, limit)
        if size is not None:
            return _overrides(stage, number, changes, size)
    return None


def _changes(stage: Stage, setting: Setting) -> list[dict[str, Any]]:
    """Return what may be changed beside the batch, in order."""
    changes: list[dict[str, Any]] = []
    if setting.device == "cpu" and stage.feature_cache.mode != "off" and stage.cache.memory > LEAST:
        changes.append({"cache.mode": stage.cache.mode, "cache.memory": LEAST})
    if stage.lm is None:
        return changes
    changes += [{"lm.dtype": "bfloat16"}] if stage.lm.dtype != "bfloat16" else []
    if not stage.optim.checkpointing and stage.train:
        changes.append({"optim.checkpointing": True})
    if stage.lm.quantize is None and not stage.trains("lm"):
        changes += [{"lm.quantize": "8bit"}, {"lm.quantize": "4bit"}]
    return changes


def _largest_batch(stage: Stage, setting: Setting, limit: int) -> int | None:
    """Return the largest divisor of the batch that fits: memory is linear in it, so two points give a guess."""
    sizes = [size for size in range(1, stage.batch_size + 1) if stage.batch_size % size == 0]
    sizes = [size for size in sizes if size >= setting.processes]
    if stage.fit is not None:
        sizes = sizes[-1:]
    least = _peak(stage, setting, sizes[0])
    if least > limit:
        return None
    most = _peak(stage, setting, sizes[-1]) if len(sizes) > 1 else least
    if most <= limit:
        return sizes[-1]
    share = (limit - least) / (most - least)
    guesses = [size for size in sizes if size <= sizes[0] + share * (sizes[-1] - sizes[0])]
    return next((size for size in reversed(guesses) if _peak(stage, setting, size) <= limit), sizes[0])


def _peak(stage: Stage, setting: Setting, batch: int) -> int:
    optim = stage.optim.model_copy(update={"accumulate": stage.optim.accumulate * stage.batch_size // batch})
    changed = stage.model_copy(update={"batch_size": batch, "optim": optim})
    return plan_stage(Draft(changed, setting.device), setting).memory.peak


def _with(stage: Stage, changes: dict[str, Any]) -> Stage:
    for key, value in changes.items():
        part, _, name = key.partition(".")
        if not name:
            stage = stage.model_copy(update={part: value})
            continue
        spec = getattr(stage, part)
        stage = stage.model_copy(update={part: spec.model_validate({**dict(spec), name: value})})
    return stage


def _overrides(stage: Stage, number: int, changes: dict[str, Any], batch: int) -> list[str]:
    overrides = [f"{key}={str(value).lower()}" for key, value in changes.items()]
    if batch != stage.batch_size:
        overrides += [f"stages.{number}.batch_size={batch}"]
        overrides += [f"stages.{number}.optim.accumulate={stage.optim.accumulate * stage.batch_size // batch}"]
    return overrides
