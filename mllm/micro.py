"""A batch in parts that go through the language model one after another.

Notable: a step's gradient is the same sum, so nothing changes but memory, and on a CPU speed: what a layer makes of few
rows stays in the processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mllm.prompt import Batch, Piece, images_of

POSITIONS = 1024  # of a part on a CPU, in float32: four rows of LLaVA's 196 visual tokens and their text

Part = tuple[Sequence[list[Piece]], Tensor | None, Batch]


def rows_at_once(rows: int, length: int, dtype: torch.dtype) -> int:
    """Return how many of ``rows`` rows of ``length`` positions a CPU computes at once, in parts as even as can be.

    ``dtype`` is the language model's: the smaller its numbers, the more.
    """
    most = max(1, POSITIONS * torch.float32.itemsize // dtype.itemsize // length)
    return math.ceil(rows / math.ceil(rows / most))


def split(rows: Sequence[list[Piece]], features: Tensor | None, batch: Batch, *, size: int) -> list[Part]:
    """Return a batch in parts of ``size`` rows, the last of what is left.

    Args:
        rows: the examples.
        features: ``(I, ...)`` of their images in reading order, or None where there are none.
        batch: their ids ``(B, T)``.
        size: rows of a part.
    """
    counts = [len(images_of(pieces)) for pieces in rows]
    parts: list[Part] = []
    for start in range(0, len(rows), size):
        end = start + size
        first, last = sum(counts[:start]), sum(counts[:end])
        own = None if features is None or first == last else features[first:last]
        tensors = (batch.ids, batch.visual, batch.mask, batch.labels)
        parts.append((rows[start:end], own, Batch(*(tensor[start:end] for tensor in tensors))))
    return parts
