"""Print a recipe's resource estimates, and the overrides with which it fits: `mllm plan`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, get_args

from rich.console import Console

from mllm.config import loading as recipes
from mllm.errors import MLLMError, near
from mllm.planning import table
from mllm.planning.advice import bytes_of, fitting
from mllm.planning.draft import Device
from mllm.planning.plan import Plan, Setting, Sharding, plan

if TYPE_CHECKING:
    from mllm.planning.probe import Measured


def run(
    recipe: str, overrides: Sequence[str], options: dict[str, Any], *, memory: str | None, probe: bool, as_json: bool
) -> None:
    """Print a recipe's plan.

    Raises:
        MLLMError: the recipe or an option is invalid.
    """
    for name, kind in (("device", Device), ("sharding", Sharding)):
        if options[name] not in get_args(kind):
            raise MLLMError(f"--{name} {options[name]}: {near(options[name], get_args(kind))}")
    for name in ("flops", "utilisation"):
        if (value := options[name]) is not None and not 0 < value < float("inf"):
            raise MLLMError(f"--{name} {value}: expected a number above 0. Leave it out for a plan without times.")
    limit, measured = bytes_of(memory) if memory else None, None
    if probe:
        from mllm.planning.probe import probe as timed

        measured = timed(recipe, overrides, **{key: options[key] for key in ("processes", "images", "text")})
        options = {**options, "flops": measured.flops, "utilisation": 1.0, "encoder_flops": measured.encoder_flops}
        options["device"] = "gpu" if measured.gpu else "cpu"
        if measured.image_seconds is not None:
            options["image_seconds"] = measured.image_seconds
    estimates = plan(recipe, overrides, Setting(**options))
    advice = {} if limit is None else _advice(estimates, recipe, overrides, limit)
    if as_json:
        measurement = {} if measured is None else {"measured": asdict(measured)}
        print(json.dumps({**asdict(estimates), **({"fits": advice} if limit else {}), **measurement}, indent=1))
        return
    Console().print(table.table(estimates))
    advice_lines = (f"{stage}: {_advice_text(changes, limit)}" for stage, changes in advice.items())
    measured_lines = [] if measured is None else [_measured(measured)]
    for note in [*measured_lines, *table.notes(estimates), *advice_lines]:
        Console(soft_wrap=True, highlight=False).print(note, markup=False)


def _measured(measured: Measured) -> str:
    """Return what was measured as a sentence."""
    peak = "" if measured.peak is None else f", with {table.size(measured.peak)} at once in a step on the largest"
    encoder, image = measured.encoder_flops, measured.image_seconds
    parts = [
        f"{measured.stage}: measured on {measured.device}: a step of {measured.rows} x {measured.length} takes "
        f"{1e3 * measured.seconds:.4g} ms ({table.count(measured.flops)}FLOP/s){peak}",
        *([] if encoder is None else [f"the encoder computes {table.count(encoder)}FLOP/s"]),
        *([] if image is None else [f"an image takes {1e3 * image:.3g} ms of a core"]),
    ]
    return f"{'; '.join(parts)}."


def _advice(estimates: Plan, recipe: str, overrides: Sequence[str], limit: int) -> dict[str, list[str] | None]:
    """Return the overrides with which each stage fits into memory; None: no change suffices."""
    config = recipes.load(recipe, overrides)
    return {
        stage.name: [] if planned.memory.peak <= limit else fitting(stage, number, estimates.setting, limit)
        for number, (stage, planned) in enumerate(zip(config.stages, estimates.stages, strict=True))
    }


def _advice_text(changes: list[str] | None, limit: int | None) -> str:
    """Return the advice on one stage as a sentence."""
    size = table.size(limit or 0)
    if changes is None:
        return (
            f"does not fit into {size}, even in 4 bits with batches of one example: use a smaller model, or more "
            "processes."
        )
    return f"fits into {size}." if not changes else f"fits into {size} with {' '.join(changes)}"
