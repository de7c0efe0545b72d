"""Print a plan as a table with a column for each stage."""

from __future__ import annotations

from collections.abc import Callable

from rich.table import Table

from mllm.planning.plan import Plan, StagePlan
from mllm.planning.sizes import Idle

Row = tuple[str, Callable[[StagePlan], str]]


def table(plan: Plan) -> Table:
    """Return the table of a plan."""
    setting = plan.setting
    where = f"{setting.processes} {setting.device.upper()}{'s' if setting.processes > 1 else ''}"
    shared = "" if setting.sharding == "none" else f", {setting.sharding}"
    result = Table("", *(stage.name for stage in plan.stages), title=f"{plan.recipe} on {where}{shared}")
    for rows in (_parameters(plan), _BATCH, _MEMORY, _WORK):
        for label, text in rows:
            result.add_row(label, *(text(stage) for stage in plan.stages))
        result.add_section()
    return result


def notes(plan: Plan) -> list[str]:
    """Return a line on each stage's cache, on what was assumed, and on what is trained first."""
    lines = []
    for stage in plan.stages:
        lines.append(f"{stage.name}: cache {'on' if stage.cache.recommended else 'off'}: {stage.cache.reason}.")
        if stage.assumed:
            lines.append(f"{stage.name}: assumed: {stage.assumed}.")
        if stage.idle is not None:
            lines.append(f"{stage.name}: {_idle(stage, stage.idle)}")
    return lines + plan.needs


def _idle(stage: StagePlan, idle: Idle) -> str:
    """Return a sentence on adapters that a stage holds and no stage has trained."""
    held = f"holds the adapters {idle.types} ({idle.parameters:,} parameters), which are not trained up to here"
    if idle.peak is None or idle.flops is None:
        return f"{held}."
    return (
        f"{held}: it takes {size(stage.memory.peak)} and {count(stage.flops.total)}FLOP, and without them "
        f"{size(idle.peak)} and {count(idle.flops)}FLOP. Give adapters in the first stage that trains them."
    )


def _sides(stage: StagePlan) -> str:
    time = stage.time
    return "" if time is None else f"{duration(time.data)}; {duration(time.encoder)}, {duration(time.rest)}"


def size(number: float) -> str:
    """Return bytes with a unit: ``1.25 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.3g} {unit}" if number < 1000 else f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:,.2f} TiB" if number < 100 else f"{number:,.0f} TiB"


def count(number: float) -> str:
    """Return a number with a prefix: ``1.25 G``, ``12.5 T``."""
    for unit in ("", "k", "M", "G", "T", "P", "E"):
        if number < 1000:
            return f"{number:.3g} {unit}".strip()
        number /= 1000
    return f"{number:,.0f} Z"


def duration(seconds: float | None) -> str:
    """Return a time with a unit: ``3.5 h``."""
    if seconds is None:
        return "not known: give --flops, or --probe"
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def _parameters(plan: Plan) -> list[Row]:
    names = list(dict.fromkeys(part.name for stage in plan.stages for part in stage.parts))

    def row(name: str) -> Row:
        def text(stage: StagePlan) -> str:
            part = next((part for part in stage.parts if part.name == name), None)
            if part is None:
                return ""
            how = "frozen" if not part.trained else "trained"
            if 0 < part.trained < part.parameters:
                how = f"{part.trained:,} trained"
            return f"{part.parameters:,} {how}"

        return f"{name}: parameters", text

    return [row(name) for name in names]


_BATCH: list[Row] = [
    ("tokens per image", lambda s: str(s.tokens_per_image)),
    ("rows of a batch x longest row", lambda s: f"{s.rows} x {s.length}" if s.steps else ""),
    ("text tokens: mean, 99 %", lambda s: f"{s.text.mean:.0f}, {s.text.most}" if s.text else "assumed"),
    ("KV cache of a prompt", lambda s: size(s.kv_bytes)),
]
_MEMORY: list[Row] = [
    ("memory: weights", lambda s: size(s.memory.weights)),
    ("gradients, optimizer", lambda s: f"{size(s.memory.gradients)}, {size(s.memory.optimizer)}"),
    ("activations of a step", lambda s: size(s.memory.activations)),
    ("cached features, of the host", lambda s: size(s.memory.features)),
    ("peak of a process", lambda s: f"{size(s.memory.peak)} ({s.memory.phase})"),
]
_WORK: list[Row] = [
    ("FLOPs: encoder, an image", lambda s: count(s.flops.encoder) if s.flops.encoder else "not known"),
    ("connector, a step", lambda s: count(s.flops.connector)),
    ("language model, a step", lambda s: count(s.flops.lm)),
    ("the whole stage", lambda s: count(s.flops.total)),
    ("steps, examples", lambda s: f"{s.steps or '-'}, {s.examples:,}"),
    ("images, their features", lambda s: f"{s.images:,}, {size(s.cache.bytes)} ({size(s.cache.disk)} on disk)"),
    ("data; encoder, the rest", lambda s: _sides(s)),
    ("time", lambda s: duration(s.seconds)),
    ("bound by", lambda s: s.bound or ""),
]
