"""Rankings: what a scorer finds closest to each item's query, among all candidates.

A query is a picture (of the item's choices one is its text), a caption, or an interleaved prompt (of the item's
images one is what it asks for).
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import torch

from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.media.images import ImageSource

FIRST = 100  # places of a ranking that are told
SHOWN = 5  # of a ranking's pictures, in the report
BASELINES = ("shuffled", "blind")  # another item's query; the query without its pictures


class Ranking:
    """The vectors of a suite's items, each made once, and the rankings they give.

    Args:
        items: the suite's.
        scorer: puts pictures and texts into one space, and interleaved prompts, if it can.

    Raises:
        MLLMError: an item with nothing to rank, or prompts that the scorer cannot read.
    """

    def __init__(self, items: Sequence[Item], scorer: Any) -> None:
        self._items, self._scorer = items, scorer
        for item in items:
            if not item.choices and not (item.images and (item.question or item.document)):
                raise MLLMError(f"Item {item.id!r}: nothing to rank; expected choices, or images and a question.")
        groups = {id(group): group for item in items for group in (item.images, item.choices)}  # most are shared
        pictures = dict.fromkeys(one for group in groups.values() for one in group if not isinstance(one, str))
        words = dict.fromkeys(one for group in groups.values() for one in group if isinstance(one, str))
        words |= dict.fromkeys(item.question for item in items if item.question and not item.choices)
        self._pictures = _Vectors(list(pictures), scorer.embed_images)
        self._words = _Vectors(list(words), scorer.embed_texts)
        self._places: dict[int, torch.Tensor] = {}  # of candidates that items share
        self._orders: dict[Any, torch.Tensor] = {}  # of a query and its candidates, read pair by pair

    def rows(self, condition: str) -> list[str]:
        """Return for each item the places of its first candidates, the closest first.

        Args:
            condition: ``model``, or one of `baselines`.
        """
        asked = self._items if condition != "shuffled" else [self._items[place] for place in partners(self._items)]
        prompts = [_without_pictures(item) if condition == "blind" else item.document for item in asked]
        told = _Vectors(list(dict.fromkeys(filter(None, prompts))), self._prompted)
        return [self._row(*each, told) for each in zip(self._items, asked, prompts, strict=True)]

    def _row(self, item: Item, asked: Item, prompt: tuple[Any, ...], told: _Vectors) -> str:
        many: Sequence[Any] = item.choices or item.images
        table = self._words if item.choices else self._pictures
        if id(many) not in self._places:
            self._places[id(many)] = torch.tensor([table.places[one] for one in many])
        if item.choices:
            query = self._pictures.of(asked.images[0])
        else:
            query = told.of(prompt) if prompt else self._words.of(asked.question)
        # Where a picture has several vectors, that counts which is closest.
        alike = torch.tensordot(table.vectors[self._places[id(many)]], query, ([-1], [-1]))
        closeness = alike.reshape(len(many), -1).amax(1)
        seen = set(filter(_is_picture, item.document))  # what stands in the prompt is not what is looked for
        hidden = [place for place, one in enumerate(many) if one in seen] if seen else []
        closeness[hidden] = -torch.inf
        count = min(FIRST, len(many) - len(hidden))
        order = closeness.topk(count).indices
        if hasattr(self._scorer, "matches") and not prompt:
            order = self._matched(order, many, asked, closeness)
        return " ".join(map(str, order.tolist()))

    def _matched(self, order: torch.Tensor, many: Sequence[Any], asked: Item, closeness: torch.Tensor) -> torch.Tensor:
        """Return the order, its first places put anew by what the scorer says of each pair, read at once."""
        first, rest = order[: self._scorer.rerank], order[self._scorer.rerank :]
        query: Any = asked.images[0] if asked.choices else asked.question
        if (query, id(many)) not in self._orders:
            own, same = [many[place] for place in first.tolist()], [query] * len(first)
            odds = self._scorer.matches(*((same, own) if asked.choices else (own, same)))
            self._orders[query, id(many)] = first[(odds + closeness[first]).argsort(descending=True)]
        return torch.cat([self._orders[query, id(many)], rest])

    def _prompted(self, prompts: Sequence[tuple[Any, ...]]) -> torch.Tensor:
        found: torch.Tensor
        if hasattr(self._scorer, "embed_prompts"):
            found = self._scorer.embed_prompts([list(prompt) for prompt in prompts])
        elif any(_is_picture(piece) for prompt in prompts for piece in prompt):
            raise MLLMError("These prompts hold pictures, which this scorer cannot read: take one of type retrieval.")
        else:
            found = self._scorer.embed_texts(["".join(prompt) for prompt in prompts])
        return found


class _Vectors:
    """Things and their vectors ``(N, D)``."""

    def __init__(self, things: Sequence[Any], embed: Callable[[Any], torch.Tensor]) -> None:
        self.places = {thing: place for place, thing in enumerate(things)}
        self.vectors = embed(things) if things else torch.empty(0)

    def of(self, thing: Any) -> torch.Tensor:
        """Return one's vector."""
        return self.vectors[self.places[thing]]


def baselines(items: Sequence[Item]) -> tuple[str, ...]:
    """Return what rankings of items can be held against."""
    return BASELINES if any(map(_is_picture, itertools.chain(*(item.document for item in items)))) else BASELINES[:1]


def partners(items: Sequence[Item]) -> list[int]:
    """Give each item another one of its kind, with other answers where there is one, in an order fixed by a seed."""
    kinds: dict[Any, list[int]] = defaultdict(list)
    for place, item in enumerate(items):
        kinds[(item.kind, bool(item.choices))].append(place)
    found = [0] * len(items)
    for members in kinds.values():
        Random(0).shuffle(members)
        for at, place in enumerate(members):
            others = [*members[at + 1 :], *members[:at]]
            found[place] = next((other for other in others if items[other].answers != items[place].answers), place)
    return found


def shown(item: Item, ranking: str) -> tuple[ImageSource, ...]:
    """Return the pictures that a report shows of an item: those it asks with, and the first that were found."""
    if item.choices or not item.images:
        return item.images
    found = tuple(item.images[int(place)] for place in ranking.split()[:SHOWN])
    asked = tuple(piece for piece in item.document if not isinstance(piece, str))
    return (*asked, *found)


def _is_picture(piece: Any) -> bool:
    return not isinstance(piece, str)


def _without_pictures(item: Item) -> tuple[Any, ...]:
    words = tuple(piece for piece in item.document if isinstance(piece, str))
    if item.document and not words:
        raise MLLMError(f"Item {item.id!r}: without its pictures nothing is left to ask with. Leave out 'blind'.")
    return words
