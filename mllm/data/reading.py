"""Apply one policy to the rows of all readers: a bad row is an error, or it is skipped and counted.

A reader (see `reader`) hands each row to `Reading.each`, which is the only place where an error of a row is caught.
Images that are missing are an error, or with ``missing: drop`` the items that show them are left out and counted.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args, overload

from mllm.data.files import FORM_ERRORS, Record, some
from mllm.data.items import Item
from mllm.data.lazy import Lazy
from mllm.data.values import answers_in, captions_in
from mllm.errors import MLLMError, near
from mllm.media.images import ImageFile

Missing = Literal["raise", "drop"]
KEPT = 1000  # reasons that a report keeps
LISTED = 10  # of them that an error lists
_FILES = ("path", "annotations", "questions", "problems")  # arguments that name a reader's file, for messages

Value = TypeVar("Value")
Items = TypeVar("Items", bound=Sequence[Item])
Reader = Callable[..., Sequence[Item]]


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


class Reading:
    """One reading of a source: what becomes of its bad rows and missing images.

    Args:
        skip: the share of the rows that may be bad and are skipped; 0: the first one is an error.
        missing: ``drop`` leaves out items with an image whose file is missing; ``raise``: an error that lists them.
        images: whether images are needed; else none is missing.
    """

    def __init__(self, *, skip: float = 0.0, missing: str = "raise", images: bool = True) -> None:
        if missing not in get_args(Missing):
            raise MLLMError(f"data: missing is {missing!r}. {near(str(missing), get_args(Missing))}")
        self._skip, self.missing, self._images = skip, missing, images
        self.report = Report()
        self._exists: dict[str, bool] = {}

    def run(
        self, function: Reader, options: Mapping[str, Any], check: Callable[[Item], None] | None = None
    ) -> Sequence[Item]:
        """Return the items that a reader returns for its arguments, without those that the policy leaves out.

        Args:
            function: the reader; one that is not made with `reader` returns finished items.
            options: its arguments.
            check: raises an `MLLMError` for an item that is no use.

        Raises:
            MLLMError: there are no items, more bad rows than may be skipped, missing images, or an error of the reader.
        """
        label = str(next((options[name] for name in _FILES if name in options), self.report.label))
        label += f", split {options['split']}" if options.get("split") else ""
        self.report.label = label
        body, unique = getattr(function, "body", None), getattr(function, "unique", False)
        items: Sequence[Item] = body(self, **options) if body else function(**options)
        if not isinstance(items, Lazy):
            items = self.present(items)
            if unique:
                items = self._unique(items)
            if check:
                items = [item for item in items if self._passes(item, check)]
        self._raise(items)
        return items

    def each(
        self, records: Iterable[Record], make: Callable[[Any, int], Value], expected: str, *, count: bool = True
    ) -> list[Value]:
        """Return what ``make`` makes of each row and its number; a row that it cannot be made of is bad.

        Args:
            records: the rows.
            make: raises an `MLLMError` without the name of file and row, or any exception that a value of another form
                raises.
            expected: the form of a row, for messages.
            count: these are rows of the file, of which ``skip`` is a share.
        """
        made = []
        for record in records:
            self.report.rows += count
            try:
                made.append(make(record.load(), record.number))
            except MLLMError as error:
                self.bad(f"{record.label}: {error}")
            except FORM_ERRORS as error:
                self.bad(f"{record.label} has an unexpected form ({error!r}): expected {expected}. Correct the row.")
        return made

    def bad(self, reason: str) -> None:
        """Skip and count a bad row, or raise the reason."""
        if not self._skip:
            raise MLLMError(reason)
        self.report.bad += 1
        if len(self.report.reasons) < KEPT:
            self.report.reasons.append(reason)

    def by_id(
        self, pairs: Iterable[tuple[str, Value]], label: str, *, repeats: bool = False
    ) -> dict[str, Value | None]:
        """Return rows by their ids; an id of several rows is bad, and has the value None.

        Args:
            pairs: the id and the value of each row.
            label: the file and the name of the id, for messages.
            repeats: equal rows may repeat an id.
        """
        values: dict[str, Value | None] = {}
        doubled: dict[str, None] = {}
        for key, value in pairs:
            if key in values and not (repeats and values[key] == value):
                doubled[key] = None
            values.setdefault(key, value)
        for key in doubled:
            values[key] = None
            self.bad(f"{label} {key!r} belongs to several rows; expected one. Remove or rename the others.")
        return values

    def captions(self, value: Any) -> list[str]:
        """Return a row's captions; empty ones are left out and counted."""
        return self._without_empty(captions_in(value))

    def answers(self, value: Any) -> list[str]:
        """Return a row's answers; empty ones are left out and counted."""
        return self._without_empty(answers_in(value))

    def _without_empty(self, texts: Sequence[str]) -> list[str]:
        kept = [text for text in texts if text]
        if len(kept) < len(texts):
            self.report.counts["empty texts"] += len(texts) - len(kept)
        return kept

    def available(self, image: Any) -> bool:
        """Return whether an image is kept: one that is not needed, is no file, exists, or is an error in the end."""
        if not self._images or not isinstance(image, ImageFile):
            return True
        name = str(image.path)
        if name not in self._exists:
            self._exists[name] = os.path.isfile(name)  # False for a name that is too long, a folder and a pipe
            if not self._exists[name]:
                self.report.absent.append(name)
        return self._exists[name] or self.missing == "raise"

    def present(self, items: Sequence[Item]) -> list[Item]:
        """Return the items that show no missing image."""
        kept = [item for item in items if all([self.available(image) for image in _images(item)])]
        if len(kept) < len(items):
            self.report.counts["items with a missing image"] += len(items) - len(kept)
        return kept

    def _unique(self, items: Sequence[Item]) -> list[Item]:
        """Return the items whose id no other item has."""
        times = Counter(item.id for item in items)
        for key in (key for key, number in times.items() if number > 1):
            label = f"{self.report.label}: the id {key!r}"
            self.bad(f"{label} belongs to {times[key]} items; expected one. Remove the others.")
        return [item for item in items if times[item.id] == 1]

    def _passes(self, item: Item, check: Callable[[Item], None]) -> bool:
        try:
            check(item)
        except MLLMError as error:
            self.bad(str(error))
            return False
        return True

    def _raise(self, items: Sequence[Item]) -> None:
        """Raise the error that becomes due when everything is read."""
        report, label = self.report, self.report.label
        if report.absent and self.missing == "raise":
            raise MLLMError(
                f"{label}: {len(report.absent)} of {len(self._exists)} images are missing: "
                f"{some(sorted(report.absent))}. Add the files, remove their rows, or set missing: drop to leave them "
                "out."
            )
        listed = "".join(f"\n  {reason}" for reason in report.reasons[:LISTED])
        if report.bad > self._skip * max(report.rows, len(items)):
            raise MLLMError(
                f"{label}: {report.bad} of {report.rows} rows are bad, more than data.skip={self._skip} allows. "
                f"Correct them, or raise data.skip. The first of them:{listed}"
            )
        if not items:
            left_out = "; ".join(report.lines())
            raise MLLMError(
                f"{label} contains no items{f' ({left_out})' if left_out else ''}: expected at least one. Give another "
                "file or split."
            )


@overload
def reader(function: Callable[..., Items]) -> Callable[..., Items]: ...


@overload
def reader(*, unique: bool) -> Callable[[Callable[..., Items]], Callable[..., Items]]: ...


def reader(function: Reader | None = None, *, unique: bool = True) -> Any:
    """Make a function a reader: its first argument is the `Reading` that applies the policy to its rows.

    Callers do not give that argument. They may give ``missing``: "raise" or "drop".

    Args:
        function: reads the files that its keyword arguments name.
        unique: whether an id that several items have is an error.
    """
    if function is None:
        return functools.partial(reader, unique=unique)

    @functools.wraps(function)
    def read(*, missing: Missing = "raise", **options: Any) -> Sequence[Item]:
        return Reading(missing=missing).run(read, options)

    _, *parameters = inspect.signature(function).parameters.values()
    missing = inspect.Parameter("missing", inspect.Parameter.KEYWORD_ONLY, default="raise", annotation=Missing)
    vars(read).update(body=function, unique=unique, __signature__=inspect.Signature([*parameters, missing]))
    return read


def _images(item: Item) -> list[Any]:
    return [*item.images, *(image for shot in item.shots for image in _images(shot))]
