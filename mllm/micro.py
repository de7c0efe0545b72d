"""A batch in parts that go through the language model one after another.

Notable: a step's gradient is the same sum, so nothing changes but memory, and on a CPU speed: what a layer makes of few
rows stays in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mllm.prompt import Batch, Piece, images_of

POSITIONS = 1024  # of a part on a CPU: half of the memory of 2048, and no slower (docs/log.md)

Part = tuple[Sequence[list[Piece]], Tensor | None, Batch]


def split(
    rows: Sequence[list[Piece]], features: Tensor | None, batch: Batch, *, positions: int = POSITIONS
) -> list[Part]:
    """Return a batch in parts of at most so many positions, or of one row where a row is longer.

    Args:
        rows: the examples.
        features: ``(I, ...)`` of their images in reading order, or None where there are none.
        batch: their ids ``(B, T)``.
        positions: of a part, padding counted.
    """
    size = max(1, positions // batch.ids.shape[1])
    counts = [len(images_of(pieces)) for pieces in rows]
    parts: list[Part] = []
    for start in range(0, len(rows), size):
        end = start + size
        first, last = sum(counts[:start]), sum(counts[:end])
        own = None if features is None or first == last else features[first:last]
        tensors = (batch.ids, batch.visual, batch.mask, batch.labels)
        parts.append((rows[start:end], own, Batch(*(tensor[start:end] for tensor in tensors))))
    return parts
