"""Run a decoder whose layers cross-attend to visual tokens outside of the sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mllm.lms.cross_attention import CrossAttentionMemory, EmbeddingsWithMemory, using_memory
from mllm.lms.runners.base import Group, WrappingRunner


class CrossAttendingRunner(WrappingRunner):
    """Runs another runner with the memory that its inputs, or its cache, carry.

    Args:
        inner: the runner of a decoder.
    """

    def logits(self, embeds: Any, mask: Tensor, keep: Tensor | None = None, cache: Any = None) -> Tensor:
        """Return logits ``(B, K, V)``."""
        text, memory = self._split(embeds, mask, cache)
        with using_memory(memory):
            logits = self.inner.logits(text, mask, keep, cache)
        if cache is not None:
            cache.memory = memory
        return logits

    def losses(self, embeds: Any, mask: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
        """Return the negative log-likelihood ``(N,)`` of each target, row by row, with label smoothing."""
        text, memory = self._split(embeds, mask)
        with using_memory(memory):
            return self.inner.losses(text, mask, labels, smoothing=smoothing)

    def hidden(self, embeds: Any, mask: Tensor) -> Tensor:
        """Return the states ``(B, T, D)`` that the output embeddings are applied to."""
        text, memory = self._split(embeds, mask)
        with using_memory(memory):
            return self.inner.hidden(text, mask)

    def prefill(self, embeds: Any, mask: Tensor) -> tuple[Any, Tensor]:
        """Return the cache, and the next token's logits ``(B, V)``."""
        text, memory = self._split(embeds, mask)
        with using_memory(memory):
            cache, logits = self.inner.prefill(text, mask)
        cache.memory = memory
        return cache, logits

    def fork(self, cache: Any, rows: Sequence[int]) -> Any:
        """Return a copy of a cache's rows, to be extended."""
        new = self.inner.fork(cache, rows)
        new.memory = None if cache.memory is None else cache.memory.rows(rows)
        return new

    def step(self, cache: Any, ids: Tensor, mask: Tensor, rows: Sequence[int] | None) -> Tensor:
        """Return logits ``(N, V)`` after the first tokens of answers."""
        if cache.memory is not None:
            memory = cache.memory if rows is None else cache.memory.rows(rows)
            whole = torch.cat([mask.expand(len(ids), -1), torch.ones_like(ids)], dim=1)
            cache.memory = memory.extended(whole.shape[1], whole)
        with using_memory(cache.memory):
            return self.inner.step(cache, ids, mask, rows)

    def length(self, cache: Any) -> int:
        """Return the sequence length of a cache."""
        return self.inner.length(cache)

    def groups(self, mask: Tensor, cache: Any = None, **inputs: Any) -> Iterator[Group]:
        """Yield the rows that `transformers` decodes in one call, with their memory."""
        memory = None if cache is None else cache.memory
        if "inputs_embeds" in inputs:
            inputs["inputs_embeds"], memory = self._split(inputs["inputs_embeds"], mask)
        memory = memory and memory.extended(mask.shape[1], mask)
        for group in self.inner.groups(mask, cache, **inputs):
            padded = group.inputs["attention_mask"].shape == mask.shape
            yield group._replace(memory=memory if memory is None or padded else memory.unpadded(group.rows, mask))

    def _split(self, embeds: Any, mask: Tensor, cache: Any = None) -> tuple[Tensor, CrossAttentionMemory | None]:
        """Return embeddings, and the memory of their positions and of all in the cache."""
        text, new = (embeds.embeds, embeds.memory) if isinstance(embeds, EmbeddingsWithMemory) else (embeds, None)
        if cache is None:
            return text, new
        if cache.memory is not None:
            memory = cache.memory.extended(self.length(cache) + text.shape[1], mask)
            return text, memory if new is None else memory.followed_by(new)
        return text, new and CrossAttentionMemory(new.visual, pad(new.image_numbers, (self.length(cache), 0)))
