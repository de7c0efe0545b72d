"""Compute what a connector is fitted to: word embeddings of captions, vectors of sentences, or those of a guide."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from mllm.capabilities import SpeaksWords
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.guides.contracts import EmbedsImages
from mllm.lms.stop_words import content_words
from mllm.lms.words import NEUTRAL, ordered_words, token_ids
from mllm.model import Model
from mllm.prompts.pieces import answer_text


class WordTargets:
    """The IDF-weighted mean token embeddings ``(1, D_lm)`` of items' captions."""

    def __init__(self, model: Model, items: Sequence[Item], *, stop_words: bool) -> None:
        self.lm, self.stop_words = model.lm, stop_words
        self.weight = rarity(model.lm, self._read(items))

    def __call__(self, items: Sequence[Item]) -> list[Tensor]:
        """Return the targets of items."""
        return [words_embedding(self.lm, item, self.weight)[None] for item in self._read(items)]

    def _read(self, items: Sequence[Item]) -> Sequence[Item]:
        return items if self.stop_words else [without_stop_words(item) for item in items]


class _ContentWordTargets:
    """The embeddings ``(K, D_lm)`` of the different tokens of the content words of items' captions."""

    def __init__(self, model: Model, items: Sequence[Item]) -> None:
        self.lm = model.lm
        if not any(content_words(answer) for item in items for answer in item.answers):
            raise MLLMError("stages.fit has content-words, and the captions have stop words only. Fit caption-words.")

    def __call__(self, items: Sequence[Item]) -> list[Tensor]:
        words = [dict.fromkeys(word for answer in item.answers for word in content_words(answer)) for item in items]
        ids = [list(dict.fromkeys(token for word in each for token in token_ids(self.lm, word))) for each in words]
        device = self.lm.model.device
        return [self.lm.embed(torch.tensor(each, dtype=torch.long, device=device)).float() for each in ids]


class _OrderedTargets:
    """The embeddings ``(1, Q D_lm)`` of the first Q tokens of items' first captions, then of the neutral word."""

    def __init__(self, model: Model, items: Sequence[Item]) -> None:
        self.lm, self.num_tokens = model.lm, model.connector.num_tokens
        if isinstance(model.connector, SpeaksWords):
            model.connector.vocabulary.include_captions(item.answers[0] for item in items)

    def __call__(self, items: Sequence[Item]) -> Sequence[Tensor]:
        ids = torch.tensor([ordered_words(self.lm, item.answers[0], self.num_tokens) for item in items])  # (N, Q)
        embeds: Tensor = self.lm.embed(ids.to(self.lm.model.device)).float()
        return embeds.flatten(1).split(1)


class _TextTargets:
    """One-hot vectors ``(1, S)`` of items' first answers, which the connector remembers: a memory for each question."""

    def __init__(self, model: Model, items: Sequence[Item]) -> None:
        self.outputs = model.connector.linear().out_features
        questions = dict.fromkeys(item.question for item in items)  # None: captions
        texts = [sorted({item.answers[0] for item in items if item.question == question}) for question in questions]
        device = model.lm.model.device
        neutral = torch.tensor(token_ids(model.lm, NEUTRAL)[-1:], device=device)
        embeddings = [
            [model.lm.embed(torch.tensor(token_ids(model.lm, text), device=device)) for text in each] for each in texts
        ]
        model.connector.remember(embeddings, model.lm.embed(neutral)[0])
        starts = accumulate(model.connector.sizes, initial=0)
        self.numbers = {
            (question, text): start + number
            for question, each, start in zip(questions, texts, starts, strict=False)
            for number, text in enumerate(each)
        }

    def __call__(self, items: Sequence[Item]) -> Sequence[Tensor]:
        numbers = torch.tensor([self.numbers[item.question, item.answers[0]] for item in items])
        return one_hot(numbers, self.outputs).float().split(1)


class _SentenceTargets:
    """The mean sentence vectors ``(1, D_lm)`` of items' captions."""

    def __init__(self, model: Model, items: Sequence[Item]) -> None:
        self.lm = model.lm

    def __call__(self, items: Sequence[Item]) -> list[Tensor]:
        texts = list(dict.fromkeys(text for item in items for text in item.answers))
        vectors = dict(zip(texts, self.lm.sentences(texts), strict=True))
        return [torch.stack([vectors[text] for text in item.answers]).mean(0, keepdim=True) for item in items]


class GuideTargets:
    """The vectors ``(1, D)`` that a guide makes of items' first images, the mean of several of an image."""

    def __init__(self, guide: EmbedsImages) -> None:
        self.guide = guide

    def __call__(self, items: Sequence[Item]) -> Sequence[Tensor]:
        """Return the targets of items."""
        vectors = self.guide.embed_images([item.images[0] for item in items]).float()
        return (vectors.mean(1) if vectors.dim() == 3 else vectors).split(1)


Targets = Callable[[Sequence[Item]], Sequence[Tensor]]  # of items, a row or several for each
TARGETS: dict[str, Callable[[Model, Sequence[Item]], Targets]] = {
    "content-words": _ContentWordTargets,
    "words-in-order": _OrderedTargets,
    "texts": _TextTargets,
    "sentences": _SentenceTargets,
}


def words_embedding(lm: Any, item: Item, weight: dict[int, float]) -> Tensor:
    """Return the weighted mean embedding ``(D_lm,)`` of the tokens of all captions of an item."""
    ids = [token for answer in item.answers for token in lm.tokenize(answer_text(answer))]
    weights = torch.tensor([weight[token] for token in ids], device=lm.model.device)
    embeds = lm.embed(torch.tensor(ids, device=lm.model.device)).float()  # (T, D_lm)
    return (weights[:, None] * embeds).sum(0) / weights.sum().clamp(min=1e-6)


def without_stop_words(item: Item) -> Item:
    """Return an item with the content words of its captions; a caption of stop words alone stays as it is."""
    return replace(item, answers=tuple(" ".join(content_words(each)) or each for each in item.answers))


def rarity(lm: Any, items: Sequence[Item]) -> dict[int, float]:
    """Return the inverse document frequency of each token: log((1 + captions) / captions that contain it)."""
    captions = [lm.tokenize(answer_text(answer)) for item in items for answer in item.answers]
    counts = Counter(token for ids in captions for token in set(ids))
    return {token: math.log((1 + len(captions)) / count) for token, count in counts.items()}
