"""Answer by rankings of all candidates (``answer: rank``): retrieval, by the similarities of a scorer.

A query is an image (the item's choices are the candidates), a caption, or an interleaved prompt (the item's images are
the candidates).
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import torch
from mllm.eval.answers.base import Context
from mllm.eval.scoring import MODEL

from mllm.assembly import Assembly
from mllm.capabilities import MatchesPairs, ReadsPrompts
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.media.images import ImageSource
from mllm.slots import Scorer

LONGEST = 100  # candidates in a ranking; the others are left out
SHOWN = 5  # of a ranking's images, in the report

Candidate = str | ImageSource
Document = tuple[Candidate, ...]  # an interleaved prompt


class Rank:
    """Rank the candidates of each item with the suite's scorer, or the model's own."""

    def baselines(self, items: Sequence[Item]) -> dict[str, bool]:
        """Return ``shuffled``, another item's query, and if prompts have images ``blind``, the query without them."""
        pieces = itertools.chain.from_iterable(item.document for item in items)
        return {"shuffled": True, "blind": True} if any(map(_is_image, pieces)) else {"shuffled": True}

    def answers(self, model: Assembly, items: Sequence[Item], context: Context) -> dict[str, list[str]]:
        """Return the candidates' indices, the most similar first."""
        ranking = Ranking(items, context.helpers.scorer)
        return {name: ranking.rows(name) for name in (MODEL, *context.baselines)}

    def shown_images(self, item: Item, answer: str) -> tuple[ImageSource, ...]:
        """Return the images of the query, and the first of the ranking."""
        if item.choices or not item.images:
            return item.images
        ranked = tuple(item.images[int(index)] for index in answer.split()[:SHOWN])
        return (*(piece for piece in item.document if not isinstance(piece, str)), *ranked)


class Ranking:
    """Embed a suite's images and texts once, and rank each item's candidates by similarity.

    Args:
        items: the suite's.
        scorer: embeds images and texts, and perhaps interleaved prompts (`ReadsPrompts`); it may rerank the first
            candidates by reading each pair (`MatchesPairs`).

    Raises:
        MLLMError: an item with nothing to rank.
    """

    def __init__(self, items: Sequence[Item], scorer: Scorer) -> None:
        self._items, self._scorer = items, scorer
        for item in items:
            if not item.choices and not (item.images and (item.question or item.document)):
                raise MLLMError(f"Item {item.id!r}: nothing to rank; expected choices, or images and a question.")
        groups = {id(group): group for item in items for group in (item.images, item.choices)}  # most are shared
        candidates = list(itertools.chain.from_iterable(groups.values()))
        texts = dict.fromkeys(one for one in candidates if isinstance(one, str))
        texts |= dict.fromkeys(item.question for item in items if item.question and not item.choices)
        images = dict.fromkeys(one for one in candidates if not isinstance(one, str))
        self._images = _Vectors(list(images), scorer.embed_images)
        self._texts = _Vectors(list(texts), scorer.embed_texts)
        self._rows: dict[int, torch.Tensor] = {}  # the vectors' rows of candidates that items share
        self._orders: dict[Any, torch.Tensor] = {}  # reranked, by the query and its candidates

    def rows(self, condition: str) -> list[str]:
        """Return for each item the indices of its first candidates, the most similar first.

        Args:
            condition: ``model``, ``shuffled`` or ``blind``.

        Raises:
            MLLMError: prompts that the scorer cannot read, or of which nothing is left without images.
        """
        items = self._items
        queries = [items[index] for index in partners(items)] if condition == "shuffled" else items
        prompts = [_without_images(query) if condition == "blind" else query.document for query in queries]
        embedded = _Vectors(list(dict.fromkeys(filter(None, prompts))), self._embed_prompts)
        return [self._row(*row, embedded) for row in zip(items, queries, prompts, strict=True)]

    def _row(self, item: Item, query: Item, prompt: Document, embedded: _Vectors) -> str:
        """Return the ranking of an item's candidates by another item's query, or its own."""
        candidates: Sequence[Candidate] = item.choices or item.images
        if item.choices:
            vector = self._images.of(query.images[0])
        else:
            vector = embedded.of(prompt) if prompt else self._texts.of(query.question)
        vectors = (self._texts if item.choices else self._images).vectors[self._rows_of(candidates, item)]
        products = torch.tensordot(vectors, vector, ([-1], [-1]))
        similarity = products.reshape(len(candidates), -1).amax(1)  # of an image's several vectors the most similar
        in_prompt = set(filter(_is_image, item.document))  # the images of a prompt are no candidates
        hidden = [index for index, one in enumerate(candidates) if one in in_prompt] if in_prompt else []
        similarity[hidden] = -torch.inf
        order = similarity.topk(min(LONGEST, len(candidates) - len(hidden))).indices
        if isinstance(self._scorer, MatchesPairs) and not prompt:
            order = self._reranked(self._scorer, order, candidates, query, similarity)
        return " ".join(map(str, order.tolist()))

    def _rows_of(self, candidates: Sequence[Candidate], item: Item) -> torch.Tensor:
        if id(candidates) not in self._rows:
            table = self._texts if item.choices else self._images
            self._rows[id(candidates)] = torch.tensor([table.rows[one] for one in candidates])
        return self._rows[id(candidates)]

    def _reranked(
        self,
        scorer: MatchesPairs,
        order: torch.Tensor,
        candidates: Sequence[Candidate],
        query: Item,
        similarity: torch.Tensor,
    ) -> torch.Tensor:
        """Return the order, its first candidates sorted by the log-odds that the scorer gives to each pair."""
        first, rest = order[: scorer.rerank], order[scorer.rerank :]
        asked: Any = query.images[0] if query.choices else query.question
        key = (asked, id(candidates))
        if key not in self._orders:
            ranked, repeated = [candidates[index] for index in first.tolist()], [asked] * len(first)
            images, texts = (repeated, ranked) if query.choices else (ranked, repeated)
            log_odds = scorer.matches(images, texts)
            self._orders[key] = first[(log_odds + similarity[first]).argsort(descending=True)]
        return torch.cat([self._orders[key], rest])

    def _embed_prompts(self, prompts: Sequence[Document]) -> torch.Tensor:
        if isinstance(self._scorer, ReadsPrompts):
            return self._scorer.embed_prompts([list(prompt) for prompt in prompts])
        texts = [[piece for piece in prompt if isinstance(piece, str)] for prompt in prompts]
        if list(map(len, texts)) != list(map(len, prompts)):
            raise MLLMError("These prompts have images, which this scorer cannot read: take one of type retrieval.")
        return self._scorer.embed_texts(list(map("".join, texts)))


class _Vectors:
    """Distinct things and their vectors ``(N, D)``."""

    def __init__(self, things: Sequence[Any], embed: Callable[[Any], torch.Tensor]) -> None:
        self.rows = {thing: row for row, thing in enumerate(things)}
        self.vectors = embed(things) if things else torch.empty(0)

    def of(self, thing: Any) -> torch.Tensor:
        """Return the vector of one thing."""
        return self.vectors[self.rows[thing]]


def partners(items: Sequence[Item]) -> list[int]:
    """Give each item another one of its kind, with other answers if there is one, in an order fixed by a seed."""
    kinds: dict[tuple[str, bool], list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        kinds[(item.kind, bool(item.choices))].append(index)
    partner = [0] * len(items)
    for members in kinds.values():
        Random(0).shuffle(members)
        for position, index in enumerate(members):
            others = [*members[position + 1 :], *members[:position]]
            partner[index] = next((other for other in others if items[other].answers != items[index].answers), index)
    return partner


def _is_image(piece: Candidate) -> bool:
    return not isinstance(piece, str)


def _without_images(item: Item) -> Document:
    texts = tuple(piece for piece in item.document if isinstance(piece, str))
    if item.document and not texts:
        raise MLLMError(f"Item {item.id!r}: without its images the query is empty. Leave out the baseline 'blind'.")
    return texts
