"""`mllm plan`: a plan, what would fit, and both printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, get_args

from rich.console import Console

from mllm.config import loading as recipes
from mllm.errors import MLLMError, near
from mllm.planning import table
from mllm.planning.advice import bytes_of, fitting
from mllm.planning.draft import Device
from mllm.planning.plan import Plan, Setting, Sharding, plan


def run(
    recipe: str, overrides: Sequence[str], options: dict[str, Any], *, memory: str | None, probe: bool, as_json: bool
) -> None:
    """Print a recipe's plan.

    Raises:
        MLLMError: a recipe or an option that is wrong.
    """
    for name, kind in (("device", Device), ("sharding", Sharding)):
        if options[name] not in get_args(kind):
            raise MLLMError(f"--{name} {options[name]}: {near(options[name], get_args(kind))}")
    limit = bytes_of(memory) if memory else None
    if probe:
        from mllm.planning.probe import probe as timed

        rate, encoder = timed(recipe, overrides)
        options = {**options, "flops": rate, "utilisation": 1.0, "encoder_flops": encoder}
    made = plan(recipe, overrides, Setting(**options))
    advice = {} if limit is None else _advice(made, recipe, overrides, limit)
    if as_json:
        print(json.dumps({**asdict(made), **({"fits": advice} if limit else {})}, indent=1))
        return
    Console().print(table.table(made))
    for note in [*table.notes(made), *(f"{name}: {_said(found, limit)}" for name, found in advice.items())]:
        Console(soft_wrap=True, highlight=False).print(note, markup=False)


def _advice(made: Plan, recipe: str, overrides: Sequence[str], limit: int) -> dict[str, list[str] | None]:
    """Return for each stage the overrides with which it fits."""
    config = recipes.load(recipe, overrides)
    return {
        stage.name: [] if planned.memory.peak <= limit else fitting(stage, number, made.setting, limit)
        for number, (stage, planned) in enumerate(zip(config.stages, made.stages, strict=True))
    }


def _said(found: list[str] | None, limit: int | None) -> str:
    size = table.size(limit or 0)
    if found is None:
        return (
            f"does not fit into {size}, not in 4 bits and one row at a time: take a smaller model, or more processes."
        )
    return f"fits into {size}." if not found else f"fits into {size} with {' '.join(found)}"
