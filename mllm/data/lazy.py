"""Define a sequence whose items are read only when they are needed, for data sets larger than memory."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from mllm.data.hashing import hash_of
from mllm.data.items import Item
from mllm.data.notes import Notes


class Lazy(Sequence[Item]):
    """A sequence of items, each read when it is accessed.

    Args:
        size: the number of items.
        make: returns the item at an index.
        fingerprint: returns a hash that identifies the items without reading them.
        shards: the ranges of indices that are in one file each.
        notes: what was noted of the items when the rows were read, if they were.

    Attributes:
        images: the number of different image files, where it is known.
    """

    def __init__(
        self,
        size: int,
        make: Callable[[int], Item],
        *,
        fingerprint: Callable[[], str],
        shards: Sequence[range] | None = None,
        notes: Notes | None = None,
    ) -> None:
        self._size, self._make, self.fingerprint, self.notes = size, make, fingerprint, notes
        self.shards = shards or [range(size)]
        self.images: int | None = None

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._make(number) for number in range(*index.indices(self._size))]
        if not 0 <= index < self._size:
            raise IndexError(index)
        return self._make(index)

    def part(self, indices: Sequence[int]) -> Lazy:
        """Return the items at sorted indices; nothing is read."""
        cuts = [(bisect_left(indices, shard.start), bisect_left(indices, shard.stop)) for shard in self.shards]
        digest = hashlib.sha256(f"{self.fingerprint()} {list(indices)}".encode()).hexdigest()
        return Lazy(
            len(indices),
            lambda index: self._make(indices[index]),
            fingerprint=lambda: digest,
            shards=[range(start, end) for start, end in cuts if end > start],
        )


def part_of(items: Sequence[Item], indices: Sequence[int]) -> Sequence[Item]:
    """Return the items at sorted indices: lazy ones, without their notes, or a list."""
    if not isinstance(items, Lazy):
        return [items[index] for index in indices]
    kept = items if len(indices) == len(items) else items.part(indices)
    kept.images = None if items.notes is None else len(items.notes.files)
    items.notes = None
    return kept


def joined(parts: Sequence[Sequence[Item]], noted: Callable[[Sequence[Item]], Notes]) -> Sequence[Item]:
    """Return the items of several sequences, one after another: a list, if all of them are lists.

    Args:
        parts: lists, or lazy items with notes.
        noted: returns the notes of a list.
    """
    if not any(isinstance(part, Lazy) for part in parts):
        return [item for part in parts for item in part]
    ends = list(accumulate(map(len, parts)))
    notes = Notes()
    for part in parts:
        noted_of_part = (part.notes if isinstance(part, Lazy) else None) or noted(part)
        notes.extend(noted_of_part)
        noted_of_part.forget()

    def make(index: int) -> Item:
        part = bisect_right(ends, index)
        return parts[part][index - (ends[part] - len(parts[part]))]

    def fingerprint() -> str:
        digests = [part.fingerprint() if isinstance(part, Lazy) else hash_of(part) for part in parts]
        return hashlib.sha256(f"{digests} {notes.images}".encode()).hexdigest()

    return Lazy(ends[-1], make, fingerprint=fingerprint, notes=notes)
