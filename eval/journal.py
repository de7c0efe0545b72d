"""What was answered so far, on disk: an evaluation that was killed goes on where it stopped.

A line is one batch of one condition, written when it is answered. The first line says what is evaluated; a journal of
anything else is refused. A last line that was cut short is passed over, and its batch is answered again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mllm.errors import MLLMError

NAME = "answers.{rank}.partial.jsonl"


class Journal:
    """The batches of one evaluation that one process has answered.

    Args:
        folder: where it is kept; None: nowhere.
        about: what decides the answers: suite, data, model.
        rank: of the process.

    Raises:
        MLLMError: the folder holds another evaluation's journal, or one with a damaged line.
    """

    def __init__(self, folder: Path | None, about: dict[str, Any], rank: int = 0) -> None:
        self._path = folder and folder / NAME.format(rank=rank)
        self._known: dict[str, list[Any]] = {}
        if self._path is None:
            return
        head = json.dumps(about, sort_keys=True)
        lines = self._lines()
        if lines and lines[0] != head:
            raise MLLMError(
                f"{self._path} is of another evaluation (suite, data, model or version differ). "
                "Move it away, or give another --out."
            )
        for number, line in enumerate(lines[1:], start=2):
            try:
                batch, answers = json.loads(line)
                self._known[batch] = list(answers)
            except (ValueError, TypeError):
                raise MLLMError(f"{self._path}, line {number}, is damaged. Remove the file to start again.") from None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("".join(f"{line}\n" for line in lines or [head]))

    def get(self, batch: str) -> list[Any] | None:
        """Return a batch's answers, if they are there."""
        return self._known.get(batch)

    def put(self, batch: str, answers: list[Any]) -> None:
        """Keep a batch's answers: they are on disk when this returns."""
        if self._path is None:
            return
        with self._path.open("a") as file:
            file.write(json.dumps([batch, answers]) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Remove the journal: what it held is in the report."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _lines(self) -> list[str]:
        """Return the lines that are whole."""
        if self._path is None or not self._path.exists():
            return []
        return self._path.read_text().split("\n")[:-1]
