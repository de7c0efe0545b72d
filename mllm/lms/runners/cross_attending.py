"""Run a decoder whose layers attend to visual tokens outside of the sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mllm.lms.cross_attention import Sight, Sighted, looking


class Looking:
    """A way of running whose layers look at visual tokens beside the sequence.

    Args:
        way: of `mllm.lms.runners.base`, one of a decoder.
    """

    def __init__(self, way: Any) -> None:
        self.way = way

    def can_pack(self) -> bool:
        """Whether prompts can share a row."""
        return bool(self.way.can_pack())

    @property
    def goes_on(self) -> bool:
        """Whether several positions at once can follow on key-value states."""
        return bool(self.way.goes_on)

    @property
    def keeps(self) -> bool:
        """Whether logits are made for some positions alone."""
        return getattr(self.way, "keeps", False)

    def logits(self, embeds: Any, mask: Tensor, keep: Tensor | None = None, cache: Any = None) -> Tensor:
        """Return logits ``(B, K, V)``."""
        own, sight = self._split(embeds, mask, cache)
        with looking(sight):
            logits: Tensor = self.way.logits(own, mask, keep, cache)
        if cache is not None:
            cache.sight = sight
        return logits

    def losses(self, embeds: Any, mask: Tensor, labels: Tensor) -> Tensor:
        """Return the negative log-likelihood ``(N,)`` of each target, row by row."""
        own, sight = self._split(embeds, mask)
        with looking(sight):
            return self.way.losses(own, mask, labels)

    def hidden(self, embeds: Any, mask: Tensor) -> Tensor:
        """Return the states ``(B, T, D)`` that the vocabulary's map reads."""
        own, sight = self._split(embeds, mask)
        with looking(sight):
            return self.way.hidden(own, mask)

    def prefill(self, embeds: Any, mask: Tensor) -> tuple[Any, Tensor]:
        """Return the states, and the next token's logits ``(B, V)``."""
        own, sight = self._split(embeds, mask)
        with looking(sight):
            cache, logits = self.way.prefill(own, mask)
        cache.sight = sight
        return cache, logits

    def fork(self, cache: Any, rows: Sequence[int]) -> Any:
        """Return the states of these rows, to be added to."""
        new = self.way.fork(cache, rows)
        new.sight = None if cache.sight is None else cache.sight.rows(rows)
        return new

    def step(self, cache: Any, ids: Tensor, mask: Tensor, rows: Sequence[int] | None) -> Tensor:
        """Return logits ``(N, V)`` behind the first tokens of answers."""
        if cache.sight is not None:
            sight = cache.sight if rows is None else cache.sight.rows(rows)
            whole = torch.cat([mask.expand(len(ids), -1), torch.ones_like(ids)], dim=1)
            cache.sight = sight.reaching(whole.shape[1], whole)
        with looking(cache.sight):
            return self.way.step(cache, ids, mask, rows)

    def length(self, cache: Any) -> int:
        """Return how many positions are in the cache."""
        return int(self.way.length(cache))

    def groups(self, mask: Tensor, cache: Any = None, **inputs: Any) -> Iterator[Any]:
        """Yield what `transformers` decodes in one go, with what it looks at."""
        sight = None if cache is None else cache.sight
        if "inputs_embeds" in inputs:
            inputs["inputs_embeds"], sight = self._split(inputs["inputs_embeds"], mask)
        sight = sight and sight.reaching(mask.shape[1], mask)
        for group in self.way.groups(mask, cache, **inputs):
            padded = group.inputs["attention_mask"].shape == mask.shape
            own = sight if sight is None or padded else sight.unpadded(group.rows, mask)
            yield group._replace(sight=own)

    def _split(self, embeds: Any, mask: Tensor, cache: Any = None) -> tuple[Tensor, Sight | None]:
        """Return embeddings, and what they and all in the cache look at."""
        own, new = (embeds.embeds, embeds.sight) if isinstance(embeds, Sighted) else (embeds, None)
        if cache is None:
            return own, new
        if cache.sight is not None:
            seen = cache.sight.reaching(self.length(cache) + own.shape[1], mask)
            return own, seen if new is None else seen.then(new)
        return own, new and Sight(new.visual, pad(new.looks, (self.length(cache), 0)))
