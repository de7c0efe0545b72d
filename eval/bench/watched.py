"""Watch a training process from outside: the time of each line of its log, and its peak memory.

Run as a module, this file is such a process: ``ours RECIPE OUT`` or ``plain JSON OUT``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from mllm.errors import MLLMError

POLL = 0.02  # seconds
MEMORY = "memory.json"


@dataclass(frozen=True)
class Watched:
    """The start of a process, each line of its log with its time, and its peak memory in bytes above its imports."""

    began: float
    lines: list[tuple[float, dict[str, Any]]]
    memory: int

    def at(self, step: int) -> float:
        """Return the time at which a step ended; 0: at which training began."""
        if step == 0:
            return next(stamp for stamp, _ in self.lines)
        return next(stamp for stamp, row in self.lines if row.get("step") == step and "loss" in row)


def watch(
    kind: str,
    description: Path,
    out: Path,
    *,
    environment: Mapping[str, str] = {},
    until: Callable[[dict[str, Any]], bool] = lambda row: False,
) -> Watched:
    """Run a training process to its end, or until a line of its log fulfils a condition.

    Args:
        kind: ``ours`` or ``plain``.
        description: the recipe, or the JSON of `mllm.eval.bench.plain`.
        out: a new folder.
        environment: variables that override this process's.
        until: the condition on a line; true stops the process.

    Raises:
        MLLMError: the process failed.
    """
    output = out.with_suffix(".output")
    began = time.time()
    with output.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, kind, str(description), str(out)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", **environment},
        )
        try:
            lines, stopped = _followed(process, out, until)
            status = process.poll()
        finally:
            process.kill()
            process.wait()
    if not stopped and not _memory_of(out).is_file():
        raise MLLMError(f"The process of {description} ended with status {status}: {output.read_text()[-2000:]}")
    return Watched(began, lines, 0 if stopped else json.loads(_memory_of(out).read_text()))


def _followed(
    process: subprocess.Popen[bytes], out: Path, until: Callable[[dict[str, Any]], bool]
) -> tuple[list[tuple[float, dict[str, Any]]], bool]:
    """Return the lines of a process's log with their times, and whether one fulfilled the condition."""
    lines: list[tuple[float, dict[str, Any]]] = []
    log, first, read = out / "log.jsonl", out / "recipe.yaml", 0
    ended = False
    while not ended:
        ended = process.poll() is not None
        now = time.time()
        if not lines and first.is_file():  # which both write when the parts are loaded
            lines.append((now, {}))
        if log.is_file() and log.stat().st_size > read:  # the log is ASCII
            text = log.read_text()
            complete = text.rfind("\n") + 1
            for line in text[read:complete].splitlines():
                lines.append((now, json.loads(line)))
                if until(lines[-1][1]):
                    return lines, True
            read = max(read, complete)
        time.sleep(POLL)
    return lines, False


def _memory_of(out: Path) -> Path:
    return out.with_suffix(f".{MEMORY}")


def _memory(field: str) -> int:
    """Return the memory of this process in bytes: ``VmRSS``, the current, or ``VmHWM``, the peak."""
    line = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert line is not None
    return int(line[1]) * 1024


def main(kind: str, description: str, out: str) -> None:
    """Train, and write the peak memory above the imports."""
    if kind == "ours":
        from mllm.system import keep_freed_memory

        keep_freed_memory()  # as the command does
    work: Any = import_module("mllm.training.train" if kind == "ours" else "mllm.eval.bench.plain").train
    imports = _memory("VmRSS")
    work(description, out=out)
    _memory_of(Path(out)).write_text(json.dumps(_memory("VmHWM") - imports))


if __name__ == "__main__":
    main(*sys.argv[1:])
