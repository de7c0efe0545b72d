"""Encode interleaved prompts as token ids, and collate them into batches."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mllm.devices import moved
from mllm.prompts.pieces import (
    Control,
    Counts,
    Part,
    Piece,
    Target,
    Template,
    Token,
    counted,
    images_of,
    is_image,
    joined,
    text_of,
)

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
        return Batch(*(moved(tensor, device) for tensor in (self.ids, self.visual, self.mask, self.labels)))


def encode(pieces: Sequence[Piece], *, lm: Any, num_visual: Counts, start: bool = True) -> Encoded:
    """Return the ids of an interleaved prompt.

    Adjacent texts are tokenized together, so a prompt without images has exactly the ids of the bare language model,
    and a conversation in its chat template those of the template. The end of every target is learned, but only the last
    target has an end token in the sequence: in a conversation that continues, as in one that is answered, the next turn
    follows the answer's text directly.

    Args:
        pieces: the prompt.
        lm: the language model.
        num_visual: the visual tokens of an image: a number, or a function of the image.
        start: begin with the tokens that every sequence starts with; a chat template writes them itself.
    """
    pieces = joined(pieces)
    if any(isinstance(piece, Template) for piece in pieces):
        ids, tokens, turn_end = [], _together(pieces, lm), lm.text.turn_end
    else:
        ids, tokens, turn_end = list(lm.bos) if start else [], _apart(pieces, lm), None
    end = lm.eos if turn_end is None else turn_end
    visual, labels = [False] * len(ids), [IGNORED] * len(ids)
    ended, sizes = _ended(pieces, tokens), iter(counted(images_of(pieces), num_visual))
    for position, token in enumerate(tokens):
        new = [lm.pad] * next(sizes) if token.id is None else [token.id]
        learned = token.id is not None and any(map(_is_learned, pieces[token.first : token.last + 1]))
        new_labels = list(new) if learned else [IGNORED] * len(new)
        if position - 1 in ended and new:
            new_labels[0] = end
        ids += new
        labels += new_labels
        visual += [token.id is None] * len(new)
    if pieces and isinstance(pieces[-1], Target) and pieces[-1].ends:
        ids, labels, visual = [*ids, end], [*labels, end], [*visual, False]
    labels[:1] = [IGNORED] * len(labels[:1])  # nothing precedes the first token, so nothing can predict it
    return Encoded(ids, visual, labels)


def _together(pieces: Sequence[Piece], lm: Any) -> list[Token]:
    """Return the tokens of a conversation in a chat template, all of whose texts and images are one text.

    Control tokens are recognised in the template's own text; in the assistant's those that are not special, such as
    ``<think>``; in other turns none.
    """
    tokens: list[Token] = lm.text.tokenize_parts([_part(piece) for piece in pieces])
    return tokens


def _part(piece: Piece) -> Part:
    if is_image(piece):
        return Part(None)
    return Part(
        text_of(piece), "all" if isinstance(piece, Control) else "words" if isinstance(piece, Target) else "none"
    )


def _apart(pieces: Sequence[Piece], lm: Any) -> list[Token]:
    """Return the tokens of a prompt, in which images and control words stand between texts of their own."""
    tokens = []
    for is_text, run in itertools.groupby(enumerate(pieces), lambda each: isinstance(each[1], str | Target)):
        numbers, members = zip(*run, strict=True)
        if is_text:
            new: list[list[int]] = continued(list(map(text_of, members)), lm)
            tokens += [Token(token, at, at) for at, ids in zip(numbers, new, strict=True) for token in ids]
            continue
        for at, piece in zip(numbers, members, strict=True):
            control = lm.tokenize(piece.text, control=True) if isinstance(piece, Control) else [None]
            tokens += [Token(token, at, at) for token in control]
    return tokens


def continued(texts: list[str], lm: Any) -> list[list[int]]:
    """Return the ids of texts that follow each other: of the whole text, if each text's are followed by the next one's.

    So an answer has the ids with which it continues the prompt, though some tokenizers put a space before every text.
    """
    apart = [lm.tokenize(text) for text in texts]
    whole = lm.tokenize("".join(texts)) if len(texts) > 1 else apart[0]
    if whole == list(itertools.chain(*apart)):
        return apart
    starts = [[], *(lm.tokenize("".join(texts[:count])) for count in range(1, len(texts))), whole]
    if any(whole[: len(start)] != start for start in starts):
        return apart
    return [whole[len(start) : len(end)] for start, end in itertools.pairwise(starts)]


def _is_learned(piece: Piece) -> bool:
    return isinstance(piece, Target) or (isinstance(piece, Template) and piece.learned)


def _ended(pieces: Sequence[Piece], tokens: Sequence[Token]) -> set[int]:
    """Return the positions of the last tokens of targets that end."""
    firsts = [token.first for token in tokens]
    ends = (index for index, piece in enumerate(pieces) if isinstance(piece, Target) and piece.ends)
    return {bisect.bisect_right(firsts, index) - 1 for index in ends}


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
