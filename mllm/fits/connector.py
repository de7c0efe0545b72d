"""Fit a connector in closed form: a regression from features to the language model's embeddings.

For each image, x is the mean over positions of the inputs of the connector's linear map, and y the IDF-weighted mean
embedding of its captions' tokens, the sentence vector of its captions, the embeddings of the first caption's first Q
tokens in order, one after another, or the number of the first caption as a one-hot vector. Lexical matching (SITTA,
arXiv:2307.05591) needs no image: x is the dual encoder's vector of a token's string, and y the token's embedding.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from mllm.capabilities import EmbedsTexts, RemembersTexts, SentenceModel, SpeaksWords
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.fits.base import ClosedForm, Material
from mllm.fits.regression import NormalEquations
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
            scores of a memory's texts are 1 for the first caption and 0 for other captions' texts; ``sentences``, the
            vectors of a sentence encoder; or ``tokens``: lexical matching, which needs neither images nor captions.
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
    ) -> None:
        super().__init__(part=part, strength=strength, chunk=chunk)
        if solver not in SOLVERS:
            raise MLLMError(f"stages.fit of connector has solver {solver!r}: expected one of {', '.join(SOLVERS)}.")
        self.solver, self.targets = solver, targets

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
        return problems

    def sums(self, model: Model) -> NormalEquations:
        """Return empty sums."""
        tokens = model.connector.num_tokens if self.targets == "words-in-order" else 1
        linear = _linear(model)
        outputs = linear.out_features if self.targets == "texts" else tokens * model.lm.dim
        return NormalEquations(linear.in_features, outputs)

    def rows(self, model: Model, data: Material) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs of the linear map ``(N, X)``, and target embeddings ``(N, D_lm)``."""
        if self.targets == "tokens":
            yield from self._tokens(model, data)
            return
        target = TARGETS[self.targets](model, data.captioned)
        for items, features in data.with_features(self.chunk):
            yield model.connector.body(model.connector.cast(features)).mean(1), target(items)

    def solve(self, model: Model, sums: NormalEquations) -> tuple[Tensor, Tensor]:
        """Return weights ``(X, D_lm)`` and intercept ``(D_lm,)``."""
        return sums.solve(self.solver, self.strength)

    def quality(self, sums: NormalEquations, solution: tuple[Tensor, Tensor]) -> float:
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
            yield model.connector.body(model.connector.cast(features)).mean(1), y


class _WordTargets:
    """The IDF-weighted mean token embeddings ``(N, D_lm)`` of items' captions."""

    def __init__(self, model: Model, items: Sequence[Item]) -> None:
        self.lm, self.weight = model.lm, rarity(model.lm, items)

    def __call__(self, items: Sequence[Item]) -> Tensor:
        return torch.stack([words_embedding(self.lm, item, self.weight) for item in items])


class _OrderedTargets:
    """The embeddings ``(N, Q D_lm)`` of the first Q tokens of items' first captions, then of the neutral word."""

    def __init__(self, model: Model, items: Sequence[Item]) -> None:
        self.lm, self.num_tokens = model.lm, model.connector.num_tokens
        if isinstance(model.connector, SpeaksWords):
            model.connector.vocabulary.include_captions(item.answers[0] for item in items)

    def __call__(self, items: Sequence[Item]) -> Tensor:
        ids = torch.tensor([ordered_words(self.lm, item.answers[0], self.num_tokens) for item in items])  # (N, Q)
        embeds: Tensor = self.lm.embed(ids.to(self.lm.model.device)).float()
        return embeds.flatten(1)


class _TextTargets:
    """One-hot vectors ``(N, S)`` of items' first captions, which the connector remembers."""

    def __init__(self, model: Model, items: Sequence[Item]) -> None:
        self.outputs = _linear(model).out_features
        texts = sorted({item.answers[0] for item in items})
        self.numbers = {text: number for number, text in enumerate(texts)}
        device = model.lm.model.device
        embeddings = [model.lm.embed(torch.tensor(token_ids(model.lm, text), device=device)) for text in texts]
        neutral = torch.tensor(token_ids(model.lm, NEUTRAL)[-1:], device=device)
        model.connector.remember(embeddings, model.lm.embed(neutral)[0])

    def __call__(self, items: Sequence[Item]) -> Tensor:
        numbers = torch.tensor([self.numbers[item.answers[0]] for item in items])
        return one_hot(numbers, self.outputs).float()


class _SentenceTargets:
    """The mean sentence vectors ``(N, D_lm)`` of items' captions."""

    def __init__(self, model: Model, items: Sequence[Item]) -> None:
        self.lm = model.lm

    def __call__(self, items: Sequence[Item]) -> Tensor:
        texts = list(dict.fromkeys(text for item in items for text in item.answers))
        vectors = dict(zip(texts, self.lm.sentences(texts), strict=True))
        return torch.stack([torch.stack([vectors[text] for text in item.answers]).mean(0) for item in items])


TARGETS: dict[str, Callable[[Model, Sequence[Item]], Callable[[Sequence[Item]], Tensor]]] = {
    "caption-words": _WordTargets,
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


def rarity(lm: Any, items: Sequence[Item]) -> dict[int, float]:
    """Return the inverse document frequency of each token: log((1 + captions) / captions that contain it)."""
    captions = [lm.tokenize(answer_text(answer)) for item in items for answer in item.answers]
    counts = Counter(token for ids in captions for token in set(ids))
    return {token: math.log((1 + len(captions)) / count) for token, count in counts.items()}
