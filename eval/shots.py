"""Choose the solved examples before each item (k-shot): at random, the same for all, or by similar images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from mllm.eval.nearest import mean_features
from mllm.eval.suite import Shots

from mllm.assembly import Assembly
from mllm.data.items import Item
from mllm.errors import MLLMError

_SPARE = 100  # more than `count` are drawn, because some may have the item's own image


def with_shots(items: Sequence[Item], pool: Sequence[Item], shots: Shots, model: Assembly) -> list[Item]:
    """Return the items, each with its examples; never one with the item's own image.

    ``similar``: by the cosine of the encoder's mean features, the most similar last (Yang et al. 2022,
    https://arxiv.org/abs/2109.05014).

    Raises:
        MLLMError: too few examples, an example without an answer, or ``similar`` for items without images.
    """
    if shots.count == 0:
        return list(items)
    for example in pool:
        if not example.answers:
            raise MLLMError(f"Shots: the item {example.id!r} has no answer, so it cannot be an example.")
    if shots.select == "similar":
        orders = _similar(items, pool, shots.count + _SPARE, model)
    else:
        fixed = shots.select == "fixed"
        orders = [_sample(len(pool), shots, "" if fixed else item.id) for item in items]
    return [replace(item, shots=_first(item, pool, order, shots)) for item, order in zip(items, orders, strict=True)]


def _first(item: Item, pool: Sequence[Item], order: Sequence[int], shots: Shots) -> tuple[Item, ...]:
    """Return the first examples of an order that are not the item and do not have its image; the first comes last."""
    images = set(item.images)
    usable = [pool[index] for index in order if pool[index].id != item.id and not images & set(pool[index].images)]
    if len(usable) < shots.count:
        raise MLLMError(f"Shots: the item {item.id!r} needs {shots.count} examples, and there are {len(usable)}.")
    return tuple(reversed(usable[: shots.count]))


def _sample(size: int, shots: Shots, name: str) -> list[int]:
    return Random(f"{shots.seed}/{name}").sample(range(size), min(size, shots.count + _SPARE))


def _similar(items: Sequence[Item], pool: Sequence[Item], count: int, model: Assembly) -> list[list[int]]:
    """Return for each item the indices of the most similar examples, the most similar first."""
    if not all(item.images for item in (*items, *pool)):
        raise MLLMError("shots.select=similar needs items with images: choose select=random.")
    similarity = mean_features(items, model) @ mean_features(pool, model).T
    indices: list[list[int]] = similarity.topk(min(count, len(pool)), dim=1).indices.tolist()
    return indices
