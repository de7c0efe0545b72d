"""Define a sequence whose items are read only when they are needed, for data sets larger than memory."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

from mllm.data.items import Item


class Lazy(Sequence[Item]):
    """A sequence of items, each read when it is accessed.

    Args:
        size: the number of items.
        make: returns the item at an index.
        fingerprint: returns a hash that identifies the items without reading them.
        shards: the ranges of indices that are in one file each.
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
