"""Fit a connector in closed form: a regression from features to the language model's embeddings.

For each image, x is the mean over positions of the inputs of the connector's linear map, and y the IDF-weighted mean
embedding of its captions' tokens, the sentence vector of its captions, the embeddings of the first caption's first Q
tokens in order, one after another, the number of the first caption as a one-hot vector, or, in a row each, the
embeddings of its captions' content words (SITTA, arXiv:2307.05591). SITTA's lexical matching needs no image: x is the
dual encoder's vector of a token's string, and y the token's embedding.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from mllm.capabilities import EmbedsTexts, RemembersTexts, SentenceModel, SpeaksWords
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.fits.base import ClosedForm, Material
from mllm.fits.regression import Apart, Moments, NormalEquations
from mllm.lms.stop_words import content_words
from mllm.lms.vocabulary import lexicon
from mllm.lms.words import NEUTRAL, ordered_words, token_ids
from mllm.model import Model
from mllm.prompts.pieces import answer_text
from mllm.registry import Count, NonNegative

SOLVERS = ("ridge", "least-squares", "procrustes")


class ConnectorFit(ClosedForm):
    """Regression of the connector's last linear map, whose output then has the scale of the embeddings.

    All visual tokens share the map, except with ``words-in-order``. The modules before it (pooling, or a body with
    random weights) do not change.

    Args:
        part: the connector's path.
        solver: see `mllm.fits.regression.NormalEquations.solve`.
        targets: ``caption-words``; ``words-in-order``: visual token q is the caption's q-th token, and a neutral word
            after its end, for a linear map that returns all visual tokens of one pooled feature vector; ``texts``: the
            scores of a memory's texts are 1 for the first caption and 0 for other captions' texts, and likewise those
            of further memories for the answers to a question each; ``content-words``: a row for each different token
            of the captions' words that are no stop words; ``sentences``, the
            vectors of a sentence encoder; or ``tokens``: lexical matching, which needs neither images nor captions.
        stop_words: whether ``caption-words`` are English function words, too.
        standardize: as SITTA's code: features are standardized by their mean and deviation over the images, and
            embeddings by those of the language model's whole table; between these, the map has no intercept.
        strength: of the ridge penalty, as a fraction of the features' mean variance.
        chunk: images, or tokens, that are computed at once.

    Raises:
        MLLMError: an unknown solver.
    """

    def __init__(
        self,
        *,
        part: str = "connector",
        solver: str = "ridge",
        targets: str = "caption-words",
        strength: NonNegative = 0.01,
        chunk: Count = 64,
        stop_words: bool = True,
        standardize: bool = False,
    ) -> None:
        super().__init__(part=part, strength=strength, chunk=chunk)
        if solver not in SOLVERS:
            raise MLLMError(f"stages.fit of connector has solver {solver!r}: expected one of {', '.join(SOLVERS)}.")
        self.solver, self.targets, self.stop_words, self.standardize = solver, targets, stop_words, standardize
        self._inputs = Moments(0)

    def problems(self, model: Model) -> list[str]:
        """Return which parts the model lacks, and how a recipe gives them."""
        problems = []
        if model.connector is None or model.connector.linear() is None:
            problems.append("fits the connector, which does not end in a linear map: use another connector type.")
        elif self.targets == "words-in-order" and _shared(model):
            problems.append(
                "fits words in order, for which each visual token needs a map of its own: set encoder.select=pooled "
                "and connector={type: linear, tokens: 4}."
            )
        if model.connector is not None and isinstance(model.connector, RemembersTexts) != (self.targets == "texts"):
            problems.append("fits a memory to texts, and nothing else: set connector.type=memory and targets=texts.")
        if self.targets == "tokens" and not model.has(EmbedsTexts):
            problems.append("fits tokens, and this encoder does not embed text: set encoder.type=dual-encoder.")
        if self.targets == "sentences":
            if not model.has(SentenceModel):
                problems.append("fits sentences, and the model has no sentence encoder: set lm.type=sentences.")
        elif not model.generates_text:
            problems.append("fits words, and this lm embeds whole sentences only: set stages.fit.targets=sentences.")
        if not self.stop_words and self.targets != "caption-words":
            problems.append("leaves stop words out of caption-words only: leave out stages.fit.stop_words.")
        if self.standardize and self.targets in ("sentences", "words-in-order", "texts"):
            problems.append("standardizes embeddings of words: leave out stages.fit.standardize, or fit words.")
        return problems

    def sums(self, model: Model) -> NormalEquations | Apart:
        """Return empty sums."""
        inputs = _linear(model).in_features
        if self.targets == "texts":
            return Apart(inputs, model.connector.sizes)
        tokens = model.connector.num_tokens if self.targets == "words-in-order" else 1
        return NormalEquations(inputs, tokens * model.lm.dim)

    def rows(self, model: Model, data: Material) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs of the linear map ``(N, X)``, and target embeddings ``(N, D_lm)``."""
        self._inputs = Moments(_linear(model).in_features)
        if self.targets == "tokens":
            yield from self._tokens(model, data)
            return
        captions = data.answered if self.targets == "texts" else data.captioned
        target = self._target(model, captions)
        for items, features in data.with_features(captions, self.chunk):
            yield self._row_for_each(model.connector.body(model.connector.cast(features)).mean(1), target(items))

    def _target(self, model: Model, items: Sequence[Item]) -> Targets:
        """Return the function from items to their targets."""
        if self.targets == "caption-words":
            return _WordTargets(model, items, stop_words=self.stop_words)
        return TARGETS[self.targets](model, items)

    def _row_for_each(self, x: Tensor, targets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return a row for each target: inputs ``(I, X)``, each as often as it has targets ``(K, D_lm)``."""
        self._inputs.add(x)
        counts = torch.tensor([len(each) for each in targets], device=x.device)
        return x.repeat_interleave(counts, 0), torch.cat(list(targets))

    def solve(self, model: Model, sums: NormalEquations | Apart) -> tuple[Tensor, Tensor]:
        """Return weights ``(X, D_lm)`` and intercept ``(D_lm,)``."""
        if not self.standardize or isinstance(sums, Apart):
            return sums.solve(self.solver, self.strength)
        table = Moments(model.lm.dim)
        table.add(model.lm.model.get_input_embeddings().weight)
        return sums.solve(self.solver, self.strength, by=(self._inputs, table))

    def quality(self, sums: NormalEquations | Apart, solution: tuple[Tensor, Tensor]) -> float:
        """Return the share of the targets' variance that the map explains (R^2)."""
        return sums.explained(*solution)

    def apply(self, model: Model, solution: tuple[Tensor, Tensor]) -> None:
        """Set the linear map."""
        weights, intercept = solution
        project = _linear(model)
        tokens = project.out_features // len(intercept)  # one feature vector may become several tokens
        project.weight.copy_(weights.T.repeat(tokens, 1))
        project.bias.copy_(intercept.repeat(tokens))

    def _tokens(self, model: Model, data: Material) -> Iterator[tuple[Tensor, Tensor]]:
        words = lexicon(model.lm)
        for start in data.track(range(0, len(words), self.chunk)):
            chunk = words[start : start + self.chunk]
            features = model.encoder.embed_texts([text for _, text in chunk])[:, None]  # (N, 1, D_vis)
            y = model.lm.embed(torch.tensor([token for token, _ in chunk], device=model.lm.model.device))
            yield self._row_for_each(model.connector.body(model.connector.cast(features)).mean(1), y[:, None])


class _WordTargets:
    """The IDF-weighted mean token embeddings ``(1, D_lm)`` of items' captions."""

    def __init__(self, model: Model, items: Sequence[Item], *, stop_words: bool) -> None:
        self.lm, self.stop_words = model.lm, stop_words
        self.weight = rarity(model.lm, self._read(items))

    def __call__(self, items: Sequence[Item]) -> list[Tensor]:
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
        self.outputs = _linear(model).out_features
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


Targets = Callable[[Sequence[Item]], Sequence[Tensor]]  # of items, a row or several for each
TARGETS: dict[str, Callable[[Model, Sequence[Item]], Targets]] = {
    "content-words": _ContentWordTargets,
    "words-in-order": _OrderedTargets,
    "texts": _TextTargets,
    "sentences": _SentenceTargets,
}


def _linear(model: Model) -> nn.Linear:
    linear: nn.Linear | None = model.connector.linear()
    assert linear is not None
    return linear


def _shared(model: Model) -> bool:
    """Whether several visual tokens share the connector's linear map."""
    width = getattr(model.lm, "dim", 0)
    return bool(width) and _linear(model).out_features != model.connector.num_tokens * width


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
