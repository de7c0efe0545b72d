"""Keep the answers of an evaluation on disk as they come, so that one that was killed continues where it stopped.

The folder is locked meanwhile, so that no other process writes to it; the lock ends with the process that has it.

A line is one batch of one condition, written when it is answered. The first line identifies the evaluation; a journal
of another one is refused. A last line that was cut short is ignored, and its batch is answered again.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mllm.errors import MLLMError
from mllm.processes import in_main_process
from mllm.system import Lock, parse_json, read_regular, remove_partial, write

NAME = "answers.{rank}.partial.jsonl"


@contextlib.contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """Let only this evaluation write to a folder, and remove what a killed one left; of several processes one locks it.

    Raises:
        MLLMError: another process has the lock, or the folder cannot be written.
    """
    if folder is None:
        yield
        return
    lock = Lock(folder)

    def acquire() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            remove_partial(folder)
        except OSError as error:
            lock.release()
            raise MLLMError(f"{str(folder)[:200]} cannot be written: {error.strerror or error}.") from None

    in_main_process(acquire)
    try:
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):  # it has files
            folder.rmdir()


class Journal:
    """The batches of one evaluation that have been answered. Every process writes a file, and reads all files.

    Args:
        folder: where it is kept; None: nowhere.
        about: what determines the answers: suite, data, model.
        rank: of the process.

    Raises:
        MLLMError: the folder holds another evaluation's journal, or one with a damaged line.
    """

    def __init__(self, folder: Path | None, about: dict[str, Any], rank: int = 0) -> None:
        self._path = folder and folder / NAME.format(rank=rank)
        self._answers: dict[str, list[Any]] = {}  # by batch
        self._started = False
        self._writing = threading.Lock()
        first = json.dumps(about, sort_keys=True)
        self._lines = [first]  # of this process's file
        for path in sorted(folder.glob(NAME.format(rank="*"))) if folder else []:
            with _explained(path):
                lines = read_regular(path).decode("utf-8", errors="replace").split("\n")[:-1]  # the complete ones
            self._read(path, lines, first)
            if path == self._path and lines:
                self._lines = lines

    def get(self, batch: str) -> list[Any] | None:
        """Return a batch's answers, if they are there."""
        return self._answers.get(batch)

    def put(self, batch: str, answers: list[Any]) -> None:
        """Add a batch's answers: they are on disk when this returns."""
        if self._path is None:
            return
        with self._writing, _explained(self._path):
            if not self._started:  # only now, because other processes may have been reading until here
                self._path.parent.mkdir(parents=True, exist_ok=True)
                lines = "".join(f"{line}\n" for line in self._lines)
                write(self._path, lambda file: file.write_text(lines, encoding="utf-8"))
                self._started = True
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([batch, answers]) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def close(self) -> None:
        """Remove the journal, all processes' files: the report has what they held."""
        if self._path is not None:
            for path in self._path.parent.glob(NAME.format(rank="*")):
                path.unlink(missing_ok=True)

    def _read(self, path: Path, lines: list[str], first: str) -> None:
        if lines and lines[0] != first:
            raise MLLMError(
                f"{path} is of another evaluation (suite, data, model or version differ). "
                "Move it away, or give another --out."
            )
        for number, line in enumerate(lines[1:], start=2):
            try:
                batch, answers = parse_json(line)
                self._answers[batch] = list(answers)
            except (ValueError, TypeError):
                raise MLLMError(f"{path}, line {number}, is damaged. Remove the file to start again.") from None


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Explain why a journal cannot be read or written, if it cannot."""
    try:
        yield
    except OSError as error:
        raise MLLMError(
            f"{path} cannot be read or written: {error.strerror or error}. What is answered is kept: free some disk "
            "space, and run the evaluation again."
        ) from None
