"""Keep the KV caches of ids that many prompts begin with, and start the rows of a batch from them.

Notable: a row that is shorter than the longest computes the last shared ids again, where others have tokens of their
own. So the batch is laid out as any other, padded on the left without gaps, and positions, masks and sliding windows
are those of prompts that are written out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

KEPT = 4  # caches, those used last
SHIFTABLE = (DynamicLayer, DynamicSlidingWindowLayer)  # a window that is not full yet has all positions


def can_shift(cache: Any, length: int) -> bool:
    """Whether a cache has a key and a value for each of ``length`` positions, and nothing else."""
    layers: list[Any] = cache.layers if isinstance(cache, Cache) else [None]
    return all(
        type(layer) in SHIFTABLE and layer.get_seq_length() == length == layer.keys.shape[-2] for layer in layers
    )


def shifted(cache: Cache, padding: Tensor) -> Cache:
    """Return a new cache of as many positions as that of one sequence, with a row for each number of ``padding (B,)``.

    A row begins with so many masked positions, and has the sequence's first states behind them.
    """
    new: Any = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    columns = (torch.arange(cache.get_seq_length(), device=padding.device) - padding[:, None]).clamp(min=0)  # (B, L)
    for layer in new.layers:
        layer.keys, layer.values = (states[0][:, columns].transpose(0, 1) for states in (layer.keys, layer.values))
    return new


class SharedPrefixes:
    """The KV caches of the last few shared prefixes, each computed once while the weights stay as they are."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, ...], tuple[Any, Cache]] = {}  # replaced, never changed: threads may share a model

    def __len__(self) -> int:
        return len(self._kept)

    def drop(self) -> None:
        """Drop all caches: other weights may run next."""
        self._kept = {}

    def of(self, ids: Sequence[int], model: nn.Module, prefill: Callable[[], Cache]) -> Cache:
        """Return the cache of ids, which nobody may extend.

        Args:
            ids: of the prefix.
            model: has all tensors that the states depend on; after a change of any, the cache is computed again.
            prefill: computes the cache.
        """
        key, weights = tuple(ids), _versions(model)
        computed_with, cache = self._kept.get(key, (None, None))
        if cache is None or computed_with != weights:
            cache = prefill()
        others = [(other, kept) for other, kept in self._kept.items() if other != key]
        self._kept = dict([*others[-(KEPT - 1) :], (key, (weights, cache))])
        return cache


def _versions(model: nn.Module) -> list[tuple[Any, ...]]:
    """Return the identity of each tensor, and how often it was changed in place."""
    tensors = chain(model.parameters(), model.buffers())
    return [(id(t), t.device, t.dtype, 0 if t.is_inference() else t._version) for t in tensors]
