"""Run cases and judge each: a right result or one `MLLMError`, within five seconds. Everything else is a problem.

Five seconds are those of this process, and twelve times as many on the clock: a busy machine is slower, and a case that
waits takes no time of its process.

A fuzzer draws each case from random numbers of its own, ``SEED/KIND/NUMBER``, so that one case can be drawn again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import random
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mllm.errors import MLLMError

SECONDS = 5.0  # of the process that a case may take
WAITING = 60.0  # seconds on the clock
BROKEN, RENEWED = 70, 71  # the exit statuses of a fuzzer that is wrong itself, and after a case that was cut off
STUCK = 90.0  # seconds after which a process that does not even react to a signal is ended
LONGEST = 8000  # characters of a message

Act = Callable[[], Any]  # raises an AssertionError for a wrong result


class Fuzzer(Protocol):
    """One kind of input."""

    def named(self) -> Mapping[str, Act]:
        """Return cases by what is wrong with them: those that gave way once, and those that are easily described."""

    def draw(self, chance: random.Random) -> tuple[str, Act]:
        """Return a random case and how it was made."""


class _Slow(BaseException):
    """A case took too long, of the process's time or on the clock."""


def judge(act: Act) -> str:
    """Run one case; return ``right``, ``refused``, or what is wrong."""
    began, started = time.process_time(), time.monotonic()
    try:
        with _alarm(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            act()
        outcome = "right"
    except MLLMError as error:
        outcome = _of_message(str(error))
    except _Slow as error:
        return f"slow: {error}, at {_place(traceback.extract_tb(error.__traceback__)[:-1])}"
    except AssertionError as error:
        outcome = f"wrong: {str(error)[:600]} at {_place(traceback.extract_tb(error.__traceback__))}"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {str(error)[:300]} at {_place(traceback.extract_tb(error.__traceback__))}"
    seconds = time.process_time() - began, time.monotonic() - started
    slow = seconds[0] > SECONDS or seconds[1] > WAITING
    return f"slow: {seconds[0]:.1f} s of the process, {seconds[1]:.1f} s: {outcome[:200]}" if slow else outcome


def _of_message(message: str) -> str:
    """Return what is wrong with the message of an error, or ``refused``."""
    try:
        message.encode()
    except UnicodeEncodeError:
        return f"a message that cannot be printed: {message[:300]!a}"
    if not 10 < len(message) < LONGEST:
        return f"a message of {len(message)} characters: {message[:300]}"
    return "refused"


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    """Raise `_Slow` in a case that takes too long."""

    def ring(number: int, _: Any) -> None:
        raise _Slow("of the process" if number == signal.SIGPROF else "on the clock")

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, WAITING))
    before = [signal.signal(number, ring) for number, _, _ in timers]
    for _, timer, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def _place(frames: Sequence[traceback.FrameSummary]) -> str:
    """Return the last line of this package in a traceback, and the last of all."""
    ours = [frame for frame in frames if "site-packages" not in frame.filename and "/lib/python" not in frame.filename]
    chosen = [*ours[-1:], *(frames[-1:] if frames and (not ours or frames[-1] != ours[-1]) else [])]
    return " -> ".join(f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno}" for frame in chosen)


def cases(fuzzer: Fuzzer, kind: str, seed: int, count: int) -> Iterator[tuple[str, Act]]:
    """Yield the named cases and then ``count`` random ones, each with its name."""
    yield from fuzzer.named().items()
    for number in range(count):
        label, act = fuzzer.draw(random.Random(f"{seed}/{kind}/{number}"))
        yield f"{number}: {label}", act


def run(
    make: Callable[[Path], Fuzzer], kind: str, folder: Path, seed: int, count: int, only: str = ""
) -> dict[str, Any]:
    """Run a fuzzer in processes of its own, a new one after each that dies; return counts and problems."""
    began, start = time.monotonic(), 0
    outcomes: Counter[str] = Counter()
    problems: dict[str, str] = {}
    report = folder / "report.jsonl"
    report.touch()
    while True:
        if not (process := os.fork()):
            _child(make, kind, folder / str(start), seed, count, start, only)
        _, status = os.waitpid(process, 0)
        rows = [json.loads(line) for line in report.read_text().splitlines()]
        if status == 0:
            break
        start = len(rows)
        if os.waitstatus_to_exitcode(status) == RENEWED:
            continue
        if os.waitstatus_to_exitcode(status) == BROKEN:
            raise RuntimeError(f"the fuzzer {kind} is wrong itself, after {len(rows)} cases")
        rows[-1]["outcome"] = f"the process died with status {status}"
        report.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        known = row["outcome"] in ("right", "refused")
        outcomes[row["outcome"] if known else "problems"] += 1
        if not known:
            problems[row["label"]] = row["outcome"]
    return {"kind": kind, "cases": len(rows), **outcomes, "seconds": round(time.monotonic() - began),
            "problems": problems}  # fmt: skip


def _child(
    make: Callable[[Path], Fuzzer], kind: str, folder: Path, seed: int, count: int, start: int, only: str
) -> None:
    """Run the cases from a number on, and end the process; a row is written before and after each case."""
    try:
        faulthandler.enable()
        folder.mkdir()
        fuzzer = make(folder)
        if hasattr(fuzzer, "warm"):
            fuzzer.warm()
        with (folder.parent / "report.jsonl").open("r+") as report:
            report.seek(0, os.SEEK_END)
            for number, (label, act) in enumerate(cases(fuzzer, kind, seed, count)):
                if number < start or not label.startswith(only):
                    continue
                before = report.tell()
                report.write(json.dumps({"label": label, "outcome": "unfinished"}) + "\n")
                report.flush()
                faulthandler.dump_traceback_later(STUCK, exit=True)
                outcome = judge(act)
                report.seek(before)
                report.write(json.dumps({"label": label, "outcome": outcome}) + "\n")
                report.truncate()
                report.flush()
                if outcome.startswith("slow: o"):  # it was cut off wherever it was, and may have left anything behind
                    os._exit(RENEWED)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(BROKEN)
