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
    """One prompt as ids. At visual tokens ``ids`` is the padding id, and ``visual`` is True."""

    ids: list[int]
    visual: list[bool]
    labels: list[int]


@dataclass(frozen=True)
class Batch:
    """Prompts of several lengths, padded on the left.

    ``ids``, ``visual``, ``mask`` and ``labels`` are ``(B, T)``; the visual tokens of the batch fill the True positions
    of ``visual`` in reading order. Where rows hold several prompts ``mask`` is ``(B, T, T)``, a block-diagonal causal
    mask.
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

    Adjacent texts are tokenized together, so a prompt without images has exactly the ids of the bare language model.
    The end of every target is learned, but only the last target has an end token in the sequence: in a conversation
    that continues, as in one that is answered, the next turn follows the answer's text directly.

    Args:
        pieces: the prompt.
        lm: the language model.
        num_visual: Q, the visual tokens of one image.
        start: begin with the tokens that every sequence starts with.
    """
    ids = list(lm.bos) if start else []
    visual, labels = [False] * len(ids), [IGNORED] * len(ids)
    pieces = joined(pieces)
    ended = False  # whether a target ends right before the next token
    for index, piece in enumerate(pieces):
        if isinstance(piece, str):
            new = lm.tokenize(piece)
            new_labels = [IGNORED] * len(new)
        elif isinstance(piece, Control):
            new = lm.tokenize(piece.text, control=True)
            new_labels = [IGNORED] * len(new)
        elif isinstance(piece, Target):
            new = [*lm.tokenize(piece.text), *([lm.eos] if piece.ends and index == len(pieces) - 1 else [])]
            new_labels = list(new)
        else:
            new, new_labels = [lm.pad] * num_visual, [IGNORED] * num_visual
        if ended and new:
            new_labels[0] = lm.eos
        ended = (isinstance(piece, Target) and piece.ends) or (ended and not new)
        ids += new
        labels += new_labels
        visual += [not isinstance(piece, str | Target | Control)] * len(new)
    labels[:1] = [IGNORED] * len(labels[:1])  # nothing precedes the first token, so nothing can predict it
    return Encoded(ids, visual, labels)


def collate(rows: Sequence[Encoded], pad: int, *, pack: int | None = None) -> Batch:
    """Return prompts of several lengths as one batch, padded on the left.

    Args:
        rows: the prompts.
        pad: the padding id.
        pack: put several prompts, in order, into rows of at most this length (or that of the longest prompt); they do
            not attend to each other.
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
        mask=_block_mask(groups, width) if pack else mask,
        labels=padded(IGNORED, lambda row: row.labels),
    )


def _packed(rows: Sequence[Encoded], limit: int) -> list[list[Encoded]]:
    """Return prompts in as few rows as their order and the limit allow, and these rows as short as possible."""
    lengths = [len(row.ids) for row in rows]
    widths = range(max(lengths), max(limit, *lengths) + 1)

    def starts(width: int) -> list[int]:
        indices, used = [0], 0
        for index, length in enumerate(lengths):
            if used + length > width:
                indices, used = [*indices, index], 0
            used += length
        return indices

    fewest = len(starts(widths[-1]))
    width = widths[bisect.bisect_left(widths, -fewest, key=lambda width: -len(starts(width)))]
    return [list(rows[start:end]) for start, end in itertools.pairwise([*starts(width), len(rows)])]


def _block_mask(groups: Sequence[Sequence[Encoded]], width: int) -> Tensor:
    """Return a mask ``(B, T, T)``: each position attends to its prompt's earlier positions and itself."""
    numbers = torch.zeros(len(groups), width, dtype=torch.long)
    for row, group in enumerate(groups):
        end = width
        for number, prompt in reversed(list(enumerate(group, start=1))):
            numbers[row, end - len(prompt.ids) : end] = number
            end -= len(prompt.ids)
    same = (numbers[:, :, None] == numbers[:, None, :]) & (numbers > 0)[:, None, :]
    return same.tril() | torch.eye(
        width, dtype=torch.bool
    )  # padding attends to itself: no row of a softmax may be empty
