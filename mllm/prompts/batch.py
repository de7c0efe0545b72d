"""Encode interleaved prompts as token ids, and collate them into batches."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mllm.prompts.pieces import Control, Piece, Target, joined

IGNORED = -100  # a label that is no target


@dataclass(frozen=True)
class Encoded:
    """One prompt as ids. At the places of visual tokens ``ids`` holds padding, and ``visual`` is True."""

    ids: list[int]
    visual: list[bool]
    labels: list[int]


@dataclass(frozen=True)
class Batch:
    """Prompts of several lengths, padded on the left.

    ``ids``, ``visual``, ``mask`` and ``labels`` are ``(B, T)``; the visual tokens of the batch fill the True places of
    ``visual`` in reading order. Where a row holds several prompts ``mask`` is ``(B, T, T)``: what each place sees.
    """

    ids: Tensor
    visual: Tensor
    mask: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return Batch(*(tensor.to(device) for tensor in (self.ids, self.visual, self.mask, self.labels)))


def encode(pieces: Sequence[Piece], *, lm: Any, num_visual: int, start: bool = True) -> Encoded:
    """Return the ids of an interleaved prompt.

    Text that stands together is tokenised together, so a prompt without images has exactly the bare language model's
    ids. ``num_visual`` is Q, the visual tokens of one image; ``start``: with what every sequence starts with.

    The end of a target is learnt. Only behind the last one does it stand in the sequence: in a conversation that goes
    on, as in one that is answered, the next turn follows right behind the answer's words.
    """
    ids = list(lm.bos) if start else []
    visual, labels = [False] * len(ids), [IGNORED] * len(ids)
    pieces = joined(pieces)
    ended = False  # a target has ended right here
    for place, piece in enumerate(pieces):
        if isinstance(piece, str):
            new = lm.tokenize(piece)
            new_labels = [IGNORED] * len(new)
        elif isinstance(piece, Control):
            new = lm.tokenize(piece.text, control=True)
            new_labels = [IGNORED] * len(new)
        elif isinstance(piece, Target):
            new = [*lm.tokenize(piece.text), *([lm.eos] if piece.ends and place == len(pieces) - 1 else [])]
            new_labels = list(new)
        else:
            new, new_labels = [lm.pad] * num_visual, [IGNORED] * num_visual
        if ended and new:
            new_labels[0] = lm.eos
        ended = (isinstance(piece, Target) and piece.ends) or (ended and not new)
        ids += new
        labels += new_labels
        visual += [not isinstance(piece, str | Target | Control)] * len(new)
    labels[:1] = [IGNORED] * len(labels[:1])  # nothing stands before it, so nothing can foretell it
    return Encoded(ids, visual, labels)


def collate(rows: Sequence[Encoded], pad: int, *, pack: int | None = None) -> Batch:
    """Return prompts of several lengths as one batch, padded on the left.

    ``pack``: several prompts stand in one row of so many positions (or as many as the longest prompt takes), in order,
    and do not see each other.
    """
    groups = _packed(rows, pack) if pack else [[row] for row in rows]
    lengths = [sum(len(row.ids) for row in group) for group in groups]
    width = max(lengths)

    def padded(fill: Any, values: Callable[[Encoded], list[Any]]) -> Tensor:
        return torch.tensor(
            [
                [fill] * (width - length) + [value for row in group for value in values(row)]
                for group, length in zip(groups, lengths, strict=True)
            ]
        )

    mask = padded(0, lambda row: [1] * len(row.ids))
    return Batch(
        ids=padded(pad, lambda row: row.ids),
        visual=padded(False, lambda row: row.visual),
        mask=_apart(groups, width) if pack else mask,
        labels=padded(IGNORED, lambda row: row.labels),
    )


def _packed(rows: Sequence[Encoded], limit: int) -> list[list[Encoded]]:
    """Return prompts in as few rows as their order and the limit allow, and those as narrow as that many can be."""
    lengths = [len(row.ids) for row in rows]
    widths = range(max(lengths), max(limit, *lengths) + 1)

    def starts(width: int) -> list[int]:
        found, taken = [0], 0
        for place, length in enumerate(lengths):
            if taken + length > width:
                found, taken = [*found, place], 0
            taken += length
        return found

    fewest = len(starts(widths[-1]))
    width = widths[bisect.bisect_left(widths, -fewest, key=lambda width: -len(starts(width)))]
    return [list(rows[start:end]) for start, end in itertools.pairwise([*starts(width), len(rows)])]


def _apart(groups: Sequence[Sequence[Encoded]], width: int) -> Tensor:
    """Return ``(B, T, T)``: each place sees what stands before it in its own prompt, and itself."""
    numbers = torch.zeros(len(groups), width, dtype=torch.long)
    for row, group in enumerate(groups):
        end = width
        for number, prompt in reversed(list(enumerate(group, start=1))):
            numbers[row, end - len(prompt.ids) : end] = number
            end -= len(prompt.ids)
    same = (numbers[:, :, None] == numbers[:, None, :]) & (numbers > 0)[:, None, :]
    return same.tril() | torch.eye(width, dtype=torch.bool)  # padding sees itself: a softmax needs something
