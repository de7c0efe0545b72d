"""Apply one policy to the rows of all readers: a bad row is an error, or it is skipped and counted.

A reader (see `reader`) hands each row to `Reading.each`, which is the only place where an error of a row is caught.
Images that are missing are an error, or with ``missing: drop`` the items that show them are left out and counted.
"""

from __future__ import annotations

import functools
import inspect
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeGuard, TypeVar, get_args, overload

from mllm.data.items import Item
from mllm.data.lazy import Lazy, joined, part_of
from mllm.data.notes import Notes
from mllm.data.presence import Presence
from mllm.data.records import Grouped, Held, Record, Records, digest_of, made
from mllm.data.report import Report
from mllm.data.values import answers_in, captions_in
from mllm.errors import MLLMError, near

Missing = Literal["raise", "drop"]
_FILES = ("path", "annotations", "questions", "problems")  # arguments that name a reader's file, for messages

Value = TypeVar("Value")
Items = TypeVar("Items", bound=Sequence[Item])
Reader = Callable[..., Sequence[Item]]


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
        self._skip, self.missing, self._needs_images = skip, missing, images
        self.report = Report()
        self._presence = Presence(self.report, drop=missing == "drop", needed=images)
        self._check: Callable[[Item], None] | None = None
        self._options: Mapping[str, Any] = {}
        self._counting = True  # a row that is read again, to draw its item, counts once

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
        self._options = options
        body, unique = getattr(function, "body", None), getattr(function, "unique", False)
        self._check = check
        items: Sequence[Item] = body(self, **options) if body else function(**options)
        notes = items.notes if isinstance(items, Lazy) else self._noted(items)
        if notes is not None:
            items = part_of(items, self._kept(notes, items, unique))
            notes.forget()
        self.report.raise_errors(
            len(items), skip=self._skip, drop=self.missing == "drop", files=self._presence.looked_for
        )
        self._counting = False
        self._presence = self._presence.afresh()
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
        values = []
        for record in records:
            self.report.rows += count
            try:
                values.append(made(record, make, expected))
            except MLLMError as error:
                self.bad(str(error))
        return values

    def items(
        self,
        records: Iterable[Record],
        make: Callable[[Any, int], Item | None],
        expected: str,
        *,
        count: bool = True,
        finish: Callable[[Item], Item] = lambda item: item,
    ) -> Sequence[Item]:
        """Return the items of rows; those of a large file are all made once, noted, and made again when they are drawn.

        Args:
            records: the rows.
            make: as for `each`; None for a row that is left out.
            expected: the form of a row, for messages.
            count: as for `each`.
            finish: returns the item that is drawn, from one with the same id and images: work that raises no error, and
                that is not done for an item which is noted only.
        """
        if not self._draws(records):
            made_of_rows = self.each(records, make, expected, count=count)
            return [finish(item) for item in made_of_rows if item is not None]
        notes, kept = Notes(), array("q")

        def note(value: Any, number: int) -> None:
            item = make(value, number)
            if item is not None:
                notes.add(item, self._check)
                kept.append(number - 1)

        def draw(index: int) -> Item:
            item = made(records.at(kept[index]), make, expected)
            assert item is not None
            return finish(item)

        self.each(records, note, expected, count=count)
        options = self._options
        return Lazy(len(kept), draw, fingerprint=lambda: digest_of(records, kept, options, notes.images), notes=notes)

    def groups(
        self,
        records: Iterable[Record],
        make: Callable[[Any, int], tuple[Any, Value] | None],
        expected: str,
        label: Callable[[Any], str],
    ) -> Records:
        """Return rows ``(key, [value, ...])`` of all rows of a key, in the order of the first of each.

        Args:
            records: the rows.
            make: as for `each`: the key and the value of a row, None for one that is left out.
            expected: the form of a row, for messages.
            label: returns the name of a key, for messages.
        """
        if not self._draws(records):
            groups: dict[Any, list[Value]] = {}
            for pair in self.each(records, make, expected):
                if pair is not None:
                    groups.setdefault(pair[0], []).append(pair[1])
            entries = list(groups.items())
            return Held(entries, lambda index: label(entries[index][0]))
        numbers: dict[Any, int] = {}
        group_of, rows = array("q"), array("q")

        def note(value: Any, number: int) -> None:
            pair = make(value, number)
            if pair is not None:
                group_of.append(numbers.setdefault(pair[0], len(numbers)))
                rows.append(number - 1)

        self.each(records, note, expected)
        return Grouped(records, group_of, rows, lambda record: self._again(record, make, expected), label)

    def _draws(self, records: Iterable[Record]) -> TypeGuard[Records]:
        """Whether items are made when they are drawn; without images an item's captions become items of their own."""
        return isinstance(records, Records) and records.stored and self._needs_images

    def _again(self, record: Record, make: Callable[[Any, int], Value], expected: str) -> Value:
        """Return what is made of a row that was read before, so that what is left out of it was counted."""
        counting, self._counting = self._counting, False
        try:
            return made(record, make, expected)
        finally:
            self._counting = counting

    def joined(self, parts: Sequence[Sequence[Item]]) -> Sequence[Item]:
        """Return the items of several files, one file after another."""
        return joined(parts, self._noted)

    def bad(self, reason: str) -> None:
        """Skip and count a bad row, or raise the reason."""
        if not self._skip:
            raise MLLMError(reason)
        self.report.note_bad(reason)

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
        if len(kept) < len(texts) and self._counting:
            self.report.counts["empty texts"] += len(texts) - len(kept)
        return kept

    def available(self, image: Any) -> bool:
        """Return whether an image is kept: one that is not needed, is no file, exists, or is an error in the end."""
        return self._presence.of(image)

    def present(self, items: Sequence[Item]) -> list[Item]:
        """Return the items that show no missing image."""
        return [items[index] for index in self._presence.showing(self._noted(items))]

    def _noted(self, items: Sequence[Item]) -> Notes:
        notes = Notes()
        for item in items:
            notes.add(item, self._check)
        return notes

    def _kept(self, notes: Notes, items: Sequence[Item], unique: bool) -> list[int]:
        """Return the indices of the items that show no missing image, have an id of their own and pass the check."""
        kept = self._presence.showing(notes)
        doubled = notes.doubled(kept, lambda index: items[index].id) if unique else {}
        for key, group in doubled.items():
            label = f"{self.report.label}: the id {key!r}"
            self.bad(f"{label} belongs to {len(group)} items; expected one. Remove the others.")
        apart = {index for group in doubled.values() for index in group}
        for index in kept:
            if index in notes.refused and index not in apart:
                self.bad(notes.refused[index])
        return [index for index in kept if index not in apart and index not in notes.refused]


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
