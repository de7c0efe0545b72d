"""Run a language model with an adapter's positions before every sequence: learned embeddings, or keys and values.

Notable: the positions are added to masks and ids here, so callers count their tokens only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mllm.capabilities import CachePrefix
from mllm.errors import MLLMError
from mllm.lms.runners.base import Group, Runner, WrappingRunner
from mllm.lms.runners.cached import CachedRunner
from mllm.lms.runners.unpadded import UnpaddedRunner
from mllm.prompts.batch import IGNORED


class PrefixedRunner(WrappingRunner):
    """Runs another runner with an adapter's positions before each sequence.

    Args:
        inner: the runner.
        adapter: has ``num_positions``, 0 where it is off, and ``embeddings(rows)``, ``(B, P, D)``, or
            ``states(rows)``, a KV cache.

    Raises:
        MLLMError: the adapter has states, and the runner no KV cache.
    """

    takes_block_masks = False  # a packed row would have one prefix for several prompts
    continues_cache = False  # the prefix comes first, and as a rule it trains
    selects_logits = False

    def __init__(self, inner: Runner, adapter: Any) -> None:
        self._adapter = adapter
        self._has_states = isinstance(adapter, CachePrefix)
        # Padding is between the prefix and a row's tokens, and a sliding window would count it.
        padded = isinstance(inner, CachedRunner) and inner.window is None
        if self._has_states and not padded:
            raise MLLMError(
                "adapters: prefix tuning needs a decoder that honours masks, continues a KV cache and has no sliding "
                "windows, and no other adapter's positions before it. Take prompt tuning alone."
            )
        super().__init__(UnpaddedRunner(inner.model) if isinstance(inner, CachedRunner) and not padded else inner)
        self._without_prefix = inner

    @property
    def inner(self) -> Runner:
        """Return the runner that is wrapped; while the adapter is off, the one that ran the model without it."""
        return self._inner if self._adapter.num_positions else self._without_prefix

    def logits(self, embeds: Tensor, mask: Tensor, keep: Tensor | None = None, cache: Any = None) -> Tensor:
        """Return logits ``(B, K, V)`` of the caller's positions."""
        whole, whole_mask, cache, new = self._start(embeds, mask, cache)
        keep = torch.arange(embeds.shape[1], device=embeds.device) if keep is None and new else keep
        return self.inner.logits(whole, whole_mask, None if keep is None else keep + new, cache)

    def losses(self, embeds: Tensor, mask: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
        """Return the negative log-likelihood ``(N,)`` of each target, row by row, with label smoothing."""
        whole, whole_mask, cache, new = self._start(embeds, mask, None)
        shifted = pad(labels, (new, 0), value=IGNORED)
        return self.inner.losses(whole, whole_mask, shifted, **_states(cache), smoothing=smoothing)

    def hidden(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """Return the states ``(B, T, D)`` that the output embeddings are applied to."""
        whole, whole_mask, cache, new = self._start(embeds, mask, None)
        return self.inner.hidden(whole, whole_mask, **_states(cache))[:, new:]

    def prefill(self, embeds: Tensor, mask: Tensor) -> tuple[Any, Tensor]:
        """Return the cache, and the next token's logits ``(B, V)``."""
        whole, whole_mask, cache, _ = self._start(embeds, mask, None)
        return self.inner.prefill(whole, whole_mask, **_states(cache))

    def fork(self, cache: Any, rows: Sequence[int]) -> Any:
        """Return a copy of a cache's rows, to be extended."""
        return self.inner.fork(cache, rows)

    def step(self, cache: Any, ids: Tensor, mask: Tensor, rows: Sequence[int] | None) -> Tensor:
        """Return logits ``(N, V)`` after the first tokens of answers."""
        return self.inner.step(cache, ids, self._masked(mask), rows)

    def length(self, cache: Any) -> int:
        """Return how many of the caller's positions are in the cache."""
        return self.inner.length(cache) - self._adapter.num_positions

    def groups(self, mask: Tensor, cache: Any = None, **inputs: Tensor) -> Iterator[Group]:
        """Yield the rows that `transformers` decodes in one call."""
        if cache is not None:
            inputs = {"input_ids": pad(inputs["input_ids"], (self._adapter.num_positions, 0))}
            return self.inner.groups(self._masked(mask), cache, **inputs)
        whole, whole_mask, cache, _ = self._start(inputs["inputs_embeds"], mask, None)
        if cache is not None:  # embeddings of what is in the cache are counted, not read
            whole = pad(whole, (0, 0, self._adapter.num_positions, 0))
        return self.inner.groups(whole_mask, cache, inputs_embeds=whole)

    def _masked(self, mask: Tensor) -> Tensor:
        return pad(mask, (self._adapter.num_positions, 0), value=1)

    def _start(self, embeds: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Tensor, Any, int]:
        """Return the inner runner's embeddings, mask and cache, and how many positions the embeddings gained."""
        count = self._adapter.num_positions
        if cache is not None or not count:
            return embeds, self._masked(mask), cache, 0
        if self._has_states:
            return embeds, self._masked(mask), self._adapter.states(len(embeds)), 0
        prefix = self._adapter.embeddings(len(embeds)).to(embeds.dtype)
        return torch.cat([prefix, embeds], dim=1), self._masked(mask), None, count


def _states(cache: Any) -> dict[str, Any]:
    """Return the argument that a runner with a KV cache takes; the others take none."""
    return {} if cache is None else {"cache": cache}
