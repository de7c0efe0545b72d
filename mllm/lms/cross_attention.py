"""Visual tokens beside the sequence: an image takes one place in it, and blocks inside the layers look aside.

Notable: what each position looks at travels with a prompt's embeddings (`Sighted`), then with its states
(`cache.sight`). Only while the language model runs is it the context's, where the blocks find it; so nothing is left in
them between calls.

Shapes: B rows, N images of a row, Q visual tokens of an image, T positions, n those that run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mllm.prompts.batch import Batch


@dataclass(frozen=True)
class Sight:
    """What the positions of a batch look at.

    Args:
        visual: tokens ``(B, N, Q, D_lm)`` of each row's images; a row that has fewer is filled up.
        looks: ``(B, T)``, the number of the image that a position looks at, from 1 on; 0: at none.
        kept: what blocks made of the visual tokens, where no gradient is wanted.
    """

    visual: Tensor
    looks: Tensor
    kept: dict[Any, Any] = field(default_factory=dict)

    def rows(self, rows: Sequence[int] | Tensor) -> Sight:
        """Return the sight of these rows."""
        rows = torch.as_tensor(rows, device=self.looks.device)
        return Sight(self.visual[rows], self.looks[rows])

    def reaching(self, length: int, mask: Tensor) -> Sight:
        """Return the sight of ``length`` positions: new ones look where the last one that counts does."""
        more = length - self.looks.shape[1]
        if more <= 0:
            return self
        last = (self.looks * mask[:, : self.looks.shape[1]]).amax(1, keepdim=True)
        return Sight(self.visual, torch.cat([self.looks, last.expand(-1, more)], dim=1), self.kept)

    def then(self, new: Sight) -> Sight:
        """Return the sight of these positions and of new ones behind them, the last of these their start."""
        count, length = self.visual.shape[1], new.looks.shape[1]
        behind = torch.where(new.looks > 0, new.looks + count, self.looks[:, -length:])
        return Sight(torch.cat([self.visual, new.visual], dim=1), torch.cat([self.looks[:, :-length], behind], dim=1))

    def unpadded(self, rows: Sequence[int] | Tensor, mask: Tensor) -> Sight:
        """Return the sight of rows of one length, without the places that a mask ``(B, T)`` leaves out."""
        rows = torch.as_tensor(rows, device=self.looks.device)
        looks = self.looks[rows][mask[rows].bool()].unflatten(0, (len(rows), -1))
        return Sight(self.visual[rows], looks)

    def of(self, states: Tensor) -> Tensor:
        """Return what each of the positions that run looks at, ``(B, n)`` of their states ``(B, n, D)``.

        They are the last ones, those that were decoded behind them included; where beams share a row it is repeated.
        """
        length = states.shape[1]
        more = max(0, length - self.looks.shape[1])
        looks = torch.cat([self.looks, self.looks[:, -1:].expand(-1, more)], dim=1)[:, -length:]
        return looks.repeat_interleave(len(states) // len(looks), dim=0)


@dataclass(frozen=True)
class Sighted:
    """A prompt's embeddings ``(B, T, D_lm)`` with what their positions look at: the language model takes both."""

    embeds: Tensor
    sight: Sight

    @property
    def shape(self) -> torch.Size:
        """Return B, T and D_lm."""
        return self.embeds.shape

    @property
    def device(self) -> torch.device:
        """Return where they are."""
        return self.embeds.device


def sighted(embeds: Tensor, visual: Tensor, batch: Batch, mark: Tensor) -> Sighted:
    """Put a mark in each image's place, and what it stands for beside the sequence.

    Args:
        embeds: ``(B, T, D_lm)``, the text's own.
        visual: tokens ``(I, Q, D_lm)`` of the batch's images.
        batch: where they stand; a position looks at the last image that it sees, an image's place at its own.
        mark: ``(D_lm,)``.
    """
    places = batch.visual
    numbers = places.long().cumsum(1)  # of images, in each row
    looks = numbers
    if batch.mask.dim() == 3:  # several prompts in a row
        looks = ((numbers * places)[:, None] * batch.mask).amax(-1)
    row, number = places.nonzero(as_tuple=True)[0], numbers[places] - 1
    beside = visual.new_zeros(len(places), int(numbers.max()), *visual.shape[1:]).index_put((row, number), visual)
    marked = torch.where(places.unsqueeze(-1), mark.to(embeds.dtype), embeds)
    return Sighted(marked, Sight(beside, looks))


def extended(embeds: Tensor | Sighted, row: int, mask: Tensor, new: Tensor) -> tuple[Tensor | Sighted, Tensor]:
    """Return one row ``(1, T + L, D_lm)`` of a batch with embeddings ``(1, L, D_lm)`` behind it, and its mask."""
    own = embeds.embeds if isinstance(embeds, Sighted) else embeds
    whole = torch.cat([own[[row]], new.to(own.dtype)], dim=1)
    counts = torch.cat([mask[[row]], mask.new_ones(new.shape[:2])], dim=1)
    if isinstance(embeds, Sighted):
        return Sighted(whole, embeds.sight.rows([row]).reaching(whole.shape[1], counts)), counts
    return whole, counts


_SIGHT: ContextVar[Sight | None] = ContextVar("sight", default=None)


def current() -> Sight | None:
    """Return the sight of what runs, None where there is nothing to look at."""
    return _SIGHT.get()


@contextlib.contextmanager
def looking(sight: Sight | None) -> Iterator[None]:
    """Let what runs look at this."""
    token = _SIGHT.set(sight)
    try:
        yield
    finally:
        _SIGHT.reset(token)
