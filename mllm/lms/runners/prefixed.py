"""What an adapter puts before every sequence: learned embeddings, or learned key-value states.

Notable: this wraps the way a language model is run (`mllm.lms.runners`) and adds the positions to masks and ids, so
callers count their own tokens only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mllm.errors import MLLMError
from mllm.lms.runners.base import Group
from mllm.lms.runners.cached import Cached
from mllm.lms.runners.unpadded import Apart
from mllm.prompts.batch import IGNORED


class Led:
    """A way of running with an adapter's positions before each sequence.

    Args:
        way: of `mllm.lms.runners.base`.
        adapter: says ``num_positions``, 0 where it is off, and has ``embeddings(rows)``, ``(B, P, D)``, or
            ``states(rows)``, a cache.

    Raises:
        MLLMError: states, and a way that has no cache.
    """

    goes_on = False  # what comes first trains, as a rule

    def __init__(self, way: Any, adapter: Any) -> None:
        self._adapter = adapter
        self._caches = hasattr(adapter, "states")
        # Padding stands between what comes first and a row's own tokens, which a sliding window would count.
        whole = isinstance(way, Cached) and not way.windowed
        if self._caches and not whole:
            raise MLLMError(
                "adapters: prefix tuning needs a decoder without sliding windows that honours masks and goes on from "
                "key-value states, and no other adapter's positions before it. Take prompt tuning alone."
            )
        self.way = Apart(way.model) if isinstance(way, Cached) and not whole else way

    def logits(self, embeds: Tensor, mask: Tensor, keep: Tensor | None = None, cache: Any = None) -> Tensor:
        """Return logits ``(B, K, V)`` of the caller's own positions."""
        given, own, cache, new = self._start(embeds, mask, cache)
        keep = torch.arange(embeds.shape[1], device=embeds.device) if keep is None and new else keep
        return self.way.logits(given, own, None if keep is None else keep + new, cache)

    def losses(self, embeds: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Return the negative log-likelihood ``(N,)`` of each target, row by row."""
        given, own, cache, new = self._start(embeds, mask, None)
        return self.way.losses(given, own, pad(labels, (new, 0), value=IGNORED), **_if(cache))

    def hidden(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """Return the states ``(B, T, D)`` that the vocabulary's map reads."""
        given, own, cache, new = self._start(embeds, mask, None)
        return self.way.hidden(given, own, **_if(cache))[:, new:]

    def prefill(self, embeds: Tensor, mask: Tensor) -> tuple[Any, Tensor]:
        """Return the states, and the next token's logits ``(B, V)``."""
        given, own, cache, _ = self._start(embeds, mask, None)
        return self.way.prefill(given, own, **_if(cache))

    def fork(self, cache: Any, rows: Sequence[int]) -> Any:
        """Return the states of these rows, to be added to."""
        return self.way.fork(cache, rows)

    def step(self, cache: Any, ids: Tensor, mask: Tensor, rows: Sequence[int] | None) -> Tensor:
        """Return logits ``(N, V)`` behind the first tokens of answers."""
        return self.way.step(cache, ids, self._masked(mask), rows)

    def length(self, cache: Any) -> int:
        """Return how many of the caller's own positions are in the cache."""
        return self.way.length(cache) - self._adapter.num_positions

    def groups(self, mask: Tensor, cache: Any = None, **inputs: Tensor) -> Iterator[Group]:
        """Yield what `transformers` decodes in one go."""
        if cache is not None:
            inputs = {"input_ids": pad(inputs["input_ids"], (self._adapter.num_positions, 0))}
            return self.way.groups(self._masked(mask), cache, **inputs)
        given, own, cache, _ = self._start(inputs["inputs_embeds"], mask, None)
        if cache is not None:  # embeddings of what is in the cache are counted, not read
            given = pad(given, (0, 0, self._adapter.num_positions, 0))
        return self.way.groups(own, cache, inputs_embeds=given)

    def _masked(self, mask: Tensor) -> Tensor:
        return pad(mask, (self._adapter.num_positions, 0), value=1)

    def _start(self, embeds: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Tensor, Any, int]:
        """Return what is run: embeddings, mask and cache, and how many positions more than the caller's there are."""
        count = self._adapter.num_positions
        if cache is not None or not count:
            return embeds, self._masked(mask), cache, 0
        if self._caches:
            return embeds, self._masked(mask), self._adapter.states(len(embeds)), 0
        first = self._adapter.embeddings(len(embeds)).to(embeds.dtype)
        return torch.cat([first, embeds], dim=1), self._masked(mask), None, count


def _if(cache: Any) -> dict[str, Any]:
    return {} if cache is None else {"cache": cache}
