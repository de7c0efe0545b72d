"""Items that are read one by one, when they are needed: for sets that are larger than memory."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

from mllm.data.items import Item


class Lazy(Sequence[Item]):
    """A sequence of items, each made when it is asked for.

    Args:
        size: how many there are.
        make: an item by its place.
        fingerprint: what tells these items from others, without reading them.
        shards: the places that one file holds, file by file.
    """

    def __init__(
        self,
        size: int,
        make: Callable[[int], Item],
        *,
        fingerprint: Callable[[], str],
        shards: Sequence[range] | None = None,
    ) -> None:
        self._size, self._make, self.fingerprint = size, make, fingerprint
        self.shards = shards or [range(size)]

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self._make(index) for index in range(*place.indices(self._size))]
        if not 0 <= place < self._size:
            raise IndexError(place)
        return self._make(place)

    def part(self, places: Sequence[int]) -> Lazy:
        """Return the items at these places, in order; nothing is read."""
        cuts = [(bisect_left(places, shard.start), bisect_left(places, shard.stop)) for shard in self.shards]
        told = hashlib.sha256(f"{self.fingerprint()} {list(places)}".encode()).hexdigest()
        return Lazy(
            len(places),
            lambda place: self._make(places[place]),
            fingerprint=lambda: told,
            shards=[range(start, end) for start, end in cuts if end > start],
        )
