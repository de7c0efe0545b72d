"""The memory of cross-attention: visual tokens outside the sequence, which blocks inside the layers attend to.

An image takes one token in the sequence, a learned marker; its visual tokens are in the memory. Notable: the memory
travels with a prompt's embeddings (`EmbeddingsWithMemory`), then with its KV cache (``cache.memory``). Only while the
language model runs is it a context variable, where the blocks read it; so nothing is left in them between calls.

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
class CrossAttentionMemory:
    """The visual tokens of a batch, and which image each position attends to.

    Args:
        visual: tokens ``(B, N, Q, D_lm)`` of each row's images; a row that has fewer is filled up.
        image_numbers: ``(B, T)``, the number of the image that a position attends to, from 1 on; 0: none.
        projections: keys and values that blocks computed from the visual tokens, where no gradient is wanted.
    """

    visual: Tensor
    image_numbers: Tensor
    projections: dict[Any, Any] = field(default_factory=dict)

    def rows(self, rows: Sequence[int] | Tensor) -> CrossAttentionMemory:
        """Return the memory of these rows."""
        rows = torch.as_tensor(rows, device=self.image_numbers.device)
        return CrossAttentionMemory(self.visual[rows], self.image_numbers[rows])

    def starting_at(self, position: int) -> CrossAttentionMemory:
        """Return the memory without the first positions."""
        return CrossAttentionMemory(self.visual, self.image_numbers[:, position:])

    def extended(self, length: int, mask: Tensor) -> CrossAttentionMemory:
        """Return the memory of ``length`` positions: new ones attend to the image of the last unmasked one."""
        more = length - self.image_numbers.shape[1]
        if more <= 0:
            return self
        last = (self.image_numbers * mask[:, : self.image_numbers.shape[1]]).amax(1, keepdim=True)
        numbers = torch.cat([self.image_numbers, last.expand(-1, more)], dim=1)
        return CrossAttentionMemory(self.visual, numbers, self.projections)

    def followed_by(self, new: CrossAttentionMemory) -> CrossAttentionMemory:
        """Return the memory of these positions, the last of which are those of ``new`` with its images."""
        count, length = self.visual.shape[1], new.image_numbers.shape[1]
        behind = torch.where(new.image_numbers > 0, new.image_numbers + count, self.image_numbers[:, -length:])
        numbers = torch.cat([self.image_numbers[:, :-length], behind], dim=1)
        return CrossAttentionMemory(torch.cat([self.visual, new.visual], dim=1), numbers)

    def unpadded(self, rows: Sequence[int] | Tensor, mask: Tensor) -> CrossAttentionMemory:
        """Return the memory of rows of equal length, without the positions that a mask ``(B, T)`` leaves out."""
        rows = torch.as_tensor(rows, device=self.image_numbers.device)
        numbers = self.image_numbers[rows][mask[rows].bool()].unflatten(0, (len(rows), -1))
        return CrossAttentionMemory(self.visual[rows], numbers)

    def numbers_for(self, states: Tensor) -> Tensor:
        """Return the image number ``(B, n)`` of each position that runs, given their states ``(B, n, D)``.

        They are the last positions, decoded ones included; where beams share a row its numbers are repeated.
        """
        length = states.shape[1]
        more = max(0, length - self.image_numbers.shape[1])
        numbers = torch.cat([self.image_numbers, self.image_numbers[:, -1:].expand(-1, more)], dim=1)[:, -length:]
        return numbers.repeat_interleave(len(states) // len(numbers), dim=0)


@dataclass(frozen=True)
class EmbeddingsWithMemory:
    """A prompt's embeddings ``(B, T, D_lm)`` with the memory of their positions: the language model takes both."""

    embeds: Tensor
    memory: CrossAttentionMemory

    @property
    def shape(self) -> torch.Size:
        """Return B, T and D_lm."""
        return self.embeds.shape

    @property
    def device(self) -> torch.device:
        """Return where they are."""
        return self.embeds.device


def embed_with_memory(embeds: Tensor, visual: Tensor, batch: Batch, marker: Tensor) -> EmbeddingsWithMemory:
    """Put a marker at each image token of the sequence, and the visual tokens into the memory.

    Args:
        embeds: ``(B, T, D_lm)`` of the text.
        visual: tokens ``(I, Q, D_lm)`` of the batch's images.
        batch: its image tokens. A position attends to the last image before it, an image's marker to its image.
        marker: ``(D_lm,)``.
    """
    is_image = batch.visual
    counts = is_image.long().cumsum(1)  # of images, in each row
    numbers = counts
    if batch.mask.dim() == 3:  # several prompts in a row
        numbers = ((counts * is_image)[:, None] * batch.mask).amax(-1)
    row, index = is_image.nonzero(as_tuple=True)[0], counts[is_image] - 1
    shape = (len(is_image), int(counts.max()), *visual.shape[1:])
    by_row = visual.new_zeros(shape).index_put((row, index), visual)
    marked = torch.where(is_image.unsqueeze(-1), marker.to(embeds.dtype), embeds)
    return EmbeddingsWithMemory(marked, CrossAttentionMemory(by_row, numbers))


def append_embeddings(
    embeds: Tensor | EmbeddingsWithMemory, row: int, mask: Tensor, new: Tensor
) -> tuple[Tensor | EmbeddingsWithMemory, Tensor]:
    """Return one row ``(1, T + L, D_lm)`` of a batch followed by embeddings ``(1, L, D_lm)``, and its mask."""
    text = embeds.embeds if isinstance(embeds, EmbeddingsWithMemory) else embeds
    whole = torch.cat([text[[row]], new.to(text.dtype)], dim=1)
    whole_mask = torch.cat([mask[[row]], mask.new_ones(new.shape[:2])], dim=1)
    if isinstance(embeds, EmbeddingsWithMemory):
        memory = embeds.memory.rows([row]).extended(whole.shape[1], whole_mask)
        return EmbeddingsWithMemory(whole, memory), whole_mask
    return whole, whole_mask


_MEMORY: ContextVar[CrossAttentionMemory | None] = ContextVar("memory", default=None)


def current_memory() -> CrossAttentionMemory | None:
    """Return the memory of the batch that runs, None where there is none."""
    return _MEMORY.get()


@contextlib.contextmanager
def using_memory(memory: CrossAttentionMemory | None) -> Iterator[None]:
    """Let the language model run with this memory."""
    token = _MEMORY.set(memory)
    try:
        yield
    finally:
        _MEMORY.reset(token)
