"""Choose the solved examples before each item (k-shot): at random, the same for all, or by similar images.

Before them may stand what the task is (task induction), and they may be repeated (Frozen, arXiv:2106.13884).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from random import Random

from mllm.eval.nearest import mean_features
from mllm.eval.suite import Shots

from mllm.assembly import Assembly
from mllm.data.items import Item
from mllm.errors import MLLMError

_SPARE = 100  # more than `count` are drawn, because some may have the item's own image


def with_shots(items: Sequence[Item], pool: Sequence[Item], shots: Shots, model: Assembly) -> list[Item]:
    """Return the items, each with its examples; never one with the item's own image.

    Examples that an item brings stay, behind those that are chosen. Of all, ``shots.inner`` of each answer are kept, in
    order, and repeated; ``shots.before`` stands before them.

    ``similar``: by the cosine of the encoder's mean features, the most similar last (Yang et al. 2022,
    https://arxiv.org/abs/2109.05014).

    Raises:
        MLLMError: too few examples, an example without an answer, or ``similar`` for items without images.
    """
    if shots.count:
        items = _chosen(items, pool, shots, model)
    return [_arranged(item, shots) for item in items]


def _chosen(items: Sequence[Item], pool: Sequence[Item], shots: Shots, model: Assembly) -> list[Item]:
    for example in pool:
        if not example.answers:
            raise MLLMError(f"Shots: the item {example.id!r} has no answer, so it cannot be an example.")
    if shots.select == "similar":
        orders = _similar(items, pool, shots.count + _SPARE, model)
    else:
        fixed = shots.select == "fixed"
        orders = [_sample(len(pool), shots, "" if fixed else item.id) for item in items]
    chosen = [_first(item, pool, order, shots) for item, order in zip(items, orders, strict=True)]
    return [replace(item, shots=(*new, *item.shots)) for item, new in zip(items, chosen, strict=True)]


def _arranged(item: Item, shots: Shots) -> Item:
    """Return an item with fewer examples of each answer, repeated, behind the words of the task."""
    counts: Counter[tuple[str, ...]] = Counter()
    kept = []
    for example in item.shots:
        counts[example.answers] += 1
        if shots.inner is None or counts[example.answers] <= shots.inner:
            kept.append(example)
    names = differences(list(dict.fromkeys(example.answers[0] for example in kept if example.answers)))
    induction = shots.before.replace("{answers}", " or ".join(names)) if shots.before else item.induction
    return replace(item, shots=tuple(kept) * shots.repeats, induction=induction)


def differences(texts: Sequence[str]) -> list[str]:
    """Return of each text the words that are not at the start or the end of all, without punctuation at the end.

    ``This is a dax.`` and ``This is a blicket.`` differ in ``dax`` and ``blicket``.
    """
    words = [text.strip().rstrip(".!?").split() for text in texts]
    if len(words) < 2:
        return [" ".join(each) for each in words]
    start = _shared(words)
    end = _shared([each[start:][::-1] for each in words])
    return [" ".join(each[start : len(each) - end]) for each in words]


def _shared(rows: Sequence[Sequence[str]]) -> int:
    """Return how many words at the start of all rows are the same."""
    return len(list(takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))))


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
