"""Solved examples before an item: drawn at random, the same for all, or those whose pictures are most alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import torch
from mllm.eval.suite import Shots

from mllm.assembly import Assembly
from mllm.data.items import Item
from mllm.errors import MLLMError

_SPARE = 100  # more than `count` are drawn, for some may be of the item's own picture
_BATCH = 32


def with_shots(items: Sequence[Item], pool: Sequence[Item], shots: Shots, model: Assembly) -> list[Item]:
    """Return the items, each with the examples that are shown before it; never one of its own picture.

    ``similar``: by the cosine of the encoder's mean features, the most alike last (Yang et al. 2022,
    https://arxiv.org/abs/2109.05014).

    Raises:
        MLLMError: there are too few examples, or one has no answer.
    """
    if shots.count == 0:
        return list(items)
    for example in pool:
        if not example.answers:
            raise MLLMError(f"Shots: the item {example.id!r} has no answer, so it is no example.")
    if shots.select == "similar":
        orders = _alike(items, pool, shots.count + _SPARE, model)
    else:
        fixed = shots.select == "fixed"
        orders = [_drawn(len(pool), shots, "" if fixed else item.id) for item in items]
    return [replace(item, shots=_first(item, pool, order, shots)) for item, order in zip(items, orders, strict=True)]


def _first(item: Item, pool: Sequence[Item], order: Sequence[int], shots: Shots) -> tuple[Item, ...]:
    """Return the first examples of an order that are neither the item nor of its picture; the best stands last."""
    own = set(item.images)
    found = [place for place in order if pool[place].id != item.id and not own & set(pool[place].images)]
    if len(found) < shots.count:
        raise MLLMError(f"Shots: {shots.count} are wanted before the item {item.id!r}, and {len(found)} can be had.")
    return tuple(pool[place] for place in reversed(found[: shots.count]))


def _drawn(size: int, shots: Shots, name: str) -> list[int]:
    return Random(f"{shots.seed}/{name}").sample(range(size), min(size, shots.count + _SPARE))


def _alike(items: Sequence[Item], pool: Sequence[Item], count: int, model: Assembly) -> list[list[int]]:
    closeness = _vectors(items, model) @ _vectors(pool, model).T
    found: list[list[int]] = closeness.topk(min(count, len(pool)), dim=1).indices.tolist()
    return found


def _vectors(items: Sequence[Item], model: Assembly) -> torch.Tensor:
    """Return the mean features of each item's last picture, of length 1: ``(N, D_vis)``."""
    if not all(item.images for item in items):
        raise MLLMError("Shots that are alike need items with pictures: choose select=random.")
    pictures: dict[Any, int] = {}
    places = [pictures.setdefault(item.images[-1], len(pictures)) for item in items]
    distinct = list(pictures)
    with torch.no_grad():
        means = [
            model.features([image.open() for image in distinct[start : start + _BATCH]]).float().mean(dim=1)
            for start in range(0, len(distinct), _BATCH)
        ]
    return torch.nn.functional.normalize(torch.cat(means), dim=-1)[places].cpu()
