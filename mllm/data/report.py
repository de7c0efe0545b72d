"""Report what was left out while a source was read: bad rows, missing images, empty texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from mllm.data.files import some


@dataclass
class Report:
    """What was left out while a source was read.

    Attributes:
        label: the source's file, for messages.
        rows: the number of rows that the files hold.
        bad: the number of bad rows that were skipped.
        reasons: why, for the first of them, each with its file and row.
        absent: the image files that are missing.
        counts: other things that were left out, by what they are.
    """

    label: str = "the data"
    rows: int = 0
    bad: int = 0
    reasons: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def left_out(self) -> dict[str, int]:
        """Return the number of everything that was left out, by what it is; nothing that is zero."""
        named = {"bad rows": self.bad, "missing images": len(self.absent), **self.counts}
        return {what: number for what, number in named.items() if number}

    def lines(self, apart: Sequence[str] = ()) -> list[str]:
        """Return a line on each kind of thing that was left out, with examples; ``apart``: kinds to pass over."""
        examples = {"bad rows": self.reasons, "missing images": self.absent}
        return [
            f"{number} {what} left out" + (f": {some(examples[what])}" if what in examples else "")
            for what, number in self.left_out().items()
            if what not in apart
        ]
