"""Print and write the results of a bench: each measurement's ratio, its target, and its bound by FLOPs."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

from mllm.system import write
from mllm.training.run import environment


@dataclass(frozen=True)
class Row:
    """One measurement: medians in `unit`, and how many times better ours is; None: there is no alternative."""

    name: str
    unit: str
    ours: float
    alternative: float | None
    ratio: float | None
    wanted: float | None
    bound: float | None = None  # of the ratio, by FLOPs
    note: str = ""


def paired(
    ours: Callable[[], Any], alternative: Callable[[], Any], *, repeats: int, progress: Callable[[str], None]
) -> tuple[list[float], list[float]]:
    """Return the times of both in seconds, run in turns after one warm-up run of each."""
    ours()
    alternative()
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats):
        for run, times in zip((ours, alternative), seconds, strict=True):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        progress(f"{repeat + 1} of {repeats}: ours {seconds[0][-1]:.2f} s, the alternative {seconds[1][-1]:.2f} s")
    return seconds


def ratio(ours: Sequence[float], alternative: Sequence[float]) -> float:
    """Return the median over the pairs of our speedup."""
    return statistics.median(b / a for a, b in zip(ours, alternative, strict=True))


def report(name: str, rows: Sequence[Row], out: Path | None) -> None:
    """Print the table, and write it as JSON if a folder is given."""
    table = Table(Column("measurement"), "unit", "ours", "alternative", "ratio", "target", "bound by FLOPs")
    for row in rows:
        label = row.name + (f"\n{row.note}" if row.note else "")
        numbers = ((row.alternative, ".3g"), (row.ratio, ".2f"), (row.wanted, ".3g"), (row.bound, ".1f"))
        cells = ("" if value is None else format(value, form) for value, form in numbers)
        table.add_row(label, row.unit, f"{row.ours:.3g}", *cells)
    Console().print(table)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        body = {
            "bench": name,
            "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
            "versions": environment(),
            "rows": [asdict(row) for row in rows],
        }
        write(out / f"{name}.json", lambda file: file.write_text(json.dumps(body, indent=2) + "\n"))
