"""Report what was left out while a source was read: bad rows, missing images, empty texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from mllm.data.files import some
from mllm.errors import MLLMError

KEPT = 1000  # reasons that a report keeps
LISTED = 10  # of them that an error lists


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

    def note_bad(self, reason: str) -> None:
        """Count a bad row."""
        self.bad += 1
        if len(self.reasons) < KEPT:
            self.reasons.append(reason)

    def raise_errors(self, items: int, *, skip: float, drop: bool, files: int) -> None:
        """Raise the error that becomes due when everything is read.

        Args:
            items: their number.
            skip: the share of the rows that may be bad.
            drop: whether items with a missing image are left out.
            files: the number of image files that were looked for.
        """
        if self.absent and not drop:
            raise MLLMError(
                f"{self.label}: {len(self.absent)} of {files} images are missing: {some(sorted(self.absent))}. Add the "
                "files, remove their rows, or set missing: drop to leave them out."
            )
        listed = "".join(f"\n  {reason}" for reason in self.reasons[:LISTED])
        if self.bad > skip * max(self.rows, items):
            raise MLLMError(
                f"{self.label}: {self.bad} of {self.rows} rows are bad, more than data.skip={skip} allows. "
                f"Correct them, or raise data.skip. The first of them:{listed}"
            )
        if not items:
            left_out = "; ".join(self.lines())
            raise MLLMError(
                f"{self.label} contains no items{f' ({left_out})' if left_out else ''}: expected at least one. Give "
                "another file or split."
            )
