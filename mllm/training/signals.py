"""Stop training or an evaluation by a signal: what is finished is on disk, and the message says how to continue.

Ctrl-C and SIGTERM (of a batch system, or of torchrun) are treated alike. Training finishes the step that is being
computed, and writes a checkpoint. A second signal stops at once, as does one that comes where there is no step to
finish: while parts are loaded, in a closed-form fit, or in an evaluation.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from accelerate.utils import gather_object

STOPPING = (signal.SIGINT, signal.SIGTERM)
NOTE = b"\nmllm: stopping after this step; once more stops at once.\n"


class Interrupted(KeyboardInterrupt):
    """Training or an evaluation was stopped by a signal; the message says how to continue.

    Args:
        message: for the user.
        status: the exit status of a command that ends with it.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Signals:
    """The signals that were received; the handlers are in place inside ``with``.

    Attributes:
        received: the last signal's number; 0: none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._deferring = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {number: signal.signal(number, self._receive) for number in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let a first signal set `received` alone."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def received_anywhere(self) -> bool:
        """Whether a process of the run has received a signal; all of them have to ask at the same moment."""
        return max(gather_object([self.received])) > 0

    def interrupted(self, run: Path, where: str) -> Interrupted:
        """Return what to raise for a run's folder, where training has stopped."""
        return self.stopped(where, ["mllm", "train", str(run / "recipe.yaml"), "--resume", str(run)])

    def stopped(self, where: str, command: Sequence[str]) -> Interrupted:
        """Return what to raise after something else was stopped, which a command continues."""
        number = signal.Signals(self.received or signal.SIGTERM)  # none: another process received it
        name = "Ctrl-C" if number == signal.SIGINT else number.name
        return Interrupted(f"Stopped by {name} {where}. Continue with: {shlex.join(command)}", 128 + number)

    def _receive(self, number: int, _: FrameType | None) -> None:
        again, self.received = self.received, number
        if again or not self._deferring:
            raise KeyboardInterrupt
        with contextlib.suppress(OSError):
            os.write(2, NOTE)
