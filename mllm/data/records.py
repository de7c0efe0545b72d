"""Define the rows of files as sequences that are held in memory, or are read again when they are needed."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mllm.errors import MLLMError

FORM_ERRORS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)  # of a value of another form

Value = TypeVar("Value")


class Record(NamedTuple):
    """A row of a file, which is parsed when it is needed, so that each row has an error of its own."""

    label: str  # the file and the row, for messages
    number: int  # counted from 1
    load: Callable[[], Any]


class Records(Sequence[Record]):
    """Rows: one after another, or, after that, by their index."""

    stored = False  # whether the rows are not in memory

    def identity(self) -> str:
        """Return a hash of the files that the rows are in; the rows were read once."""
        raise NotImplementedError

    def at(self, index: int) -> Record:
        """Return a row."""
        raise NotImplementedError

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.at(number) for number in range(*index.indices(len(self)))]
        return self.at(index)

    def __iter__(self) -> Iterator[Record]:
        return map(self.at, range(len(self)))


class Derived(Records):
    """Rows that are made of other rows when they are needed.

    Args:
        size: their number.
        make: returns one, from the other rows; its number is its index and one.
        of: the other rows.
    """

    def __init__(self, size: int, make: Callable[[int], Record], *of: Records) -> None:
        self._size, self._make, self._of = size, make, of
        self.stored = any(rows.stored for rows in of)

    def __len__(self) -> int:
        return self._size

    def at(self, index: int) -> Record:
        """Return a row."""
        return self._make(index)

    def identity(self) -> str:
        """Return a hash of the files that the rows are in."""
        return " ".join(rows.identity() for rows in self._of)


class Grouped(Derived):
    """Rows ``(key, [value, ...])`` of all rows of a key, which are read again when they are needed.

    Args:
        records: the rows.
        groups: the number of the group of each row that is in one, counted from 0.
        rows: the index of each of these rows.
        pair: returns the key and the value of a row.
        label: returns the name of a key, for messages.
    """

    def __init__(
        self,
        records: Records,
        groups: Sequence[int],
        rows: Sequence[int],
        pair: Callable[[Record], tuple[Any, Any] | None],
        label: Callable[[Any], str],
    ) -> None:
        numbers = np.array(groups, dtype=np.int64)
        members = np.array(rows, dtype=np.int64)[np.argsort(numbers, kind="stable")]
        ends = np.cumsum(np.bincount(numbers))

        def make(index: int) -> Record:
            part = members[ends[index - 1] if index else 0 : ends[index]].tolist()
            pairs = [known for row in part if (known := pair(records.at(row))) is not None]
            key = pairs[0][0]
            return Record(label(key), index + 1, lambda: (key, [value for _, value in pairs]))

        super().__init__(len(ends), make, records)


class Changed(Derived):
    """Rows that are changed one by one."""

    def __init__(self, records: Records, change: Callable[[Record], Record]) -> None:
        super().__init__(0, lambda index: change(records.at(index)), records)
        self._records, self._change = records, change

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return map(self._change, self._records)


class Chained(Derived):
    """The rows of several files, one file after another."""

    def __init__(self, parts: Sequence[Records]) -> None:
        super().__init__(0, self._row, *parts)
        self._starts: list[int] = []  # of the parts, known when all rows were read

    def __len__(self) -> int:
        return sum(map(len, self._of))

    def __iter__(self) -> Iterator[Record]:
        number = 0
        starts = []
        for part in self._of:
            starts.append(number)
            for record in part:
                number += 1
                yield record._replace(number=number)
        self._starts = starts

    def _row(self, index: int) -> Record:
        part = bisect_right(self._starts, index) - 1
        return self._of[part].at(index - self._starts[part])._replace(number=index + 1)


class Held(Records):
    """Rows in memory.

    Args:
        rows: their values, or what is parsed to get them.
        label: returns the name of a row for messages, from its index.
        load: returns the value of one of ``rows``.
    """

    def __init__(
        self, rows: Sequence[Any], label: Callable[[int], str], load: Callable[[Any], Any] = lambda row: row
    ) -> None:
        self._rows, self._label, self._load = rows, label, load

    def __len__(self) -> int:
        return len(self._rows)

    def at(self, index: int) -> Record:
        """Return a row."""
        row = self._rows[index]
        return Record(self._label(index), index + 1, lambda: self._load(row))


def made(record: Record, make: Callable[[Any, int], Value], expected: str) -> Value:
    """Return what is made of a row.

    Raises:
        MLLMError: it cannot be made, with the name of file and row.
    """
    try:
        return make(record.load(), record.number)
    except MLLMError as error:
        raise MLLMError(f"{record.label}: {error}") from None
    except FORM_ERRORS as error:
        raise MLLMError(
            f"{record.label} has an unexpected form ({error!r}): expected {expected}. Correct the row."
        ) from None


def digest_of(records: Records, kept: Sequence[int], options: Mapping[str, Any], images: str) -> str:
    """Return a hash of what items are made of.

    Args:
        records: the rows.
        kept: the indices of those that items are made of.
        options: of the reader. Those that name a file or a folder do not count: data are the same wherever they lie.
        images: a hash of the image files.
    """
    others = {key: value for key, value in options.items() if not (isinstance(value, str) and os.path.exists(value))}
    content = json.dumps([records.identity(), others, images], sort_keys=True, default=str)
    return hashlib.sha256(content.encode() + array("q", kept).tobytes()).hexdigest()


def chained(parts: Sequence[Iterable[Record]]) -> Iterable[Record]:
    """Return the rows of several files, one file after another."""
    stored = [part for part in parts if isinstance(part, Records)]
    return Chained(stored) if len(stored) == len(parts) else itertools.chain.from_iterable(parts)
