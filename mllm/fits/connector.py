"""The closed-form start of a connector: a regression from features to the language model's embeddings.

For each image, x is the mean of what the connector's linear map is applied to, and y the mean embedding of its
caption's tokens, each weighted by how rare it is among captions, or the vector of the whole caption. Or, without a
picture, x is the vector of a token's string in the space that the encoder's pictures are in, and y the token's
embedding: lexical matching (SITTA, arXiv:2307.05591).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mllm.capabilities import EmbedsTexts, SentenceModel
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.fits.base import Fit, Material
from mllm.fits.regression import NormalEquations
from mllm.lms.vocabulary import lexicon
from mllm.model import Model
from mllm.prompts.pieces import answer_text

SOLVERS = ("ridge", "least-squares", "procrustes")


class ConnectorFit(Fit):
    """Sets the connector's last linear map, so that its output has the scale of embeddings.

    Every token gets the same map. What stands before the map (pooling, or a body with random weights) stays as it is.

    Args:
        solver: see `mllm.fits.regression.NormalEquations.solve`.
        targets: ``caption-words``; ``sentences``, which the language model has vectors of; or ``tokens``: lexical
            matching, for which no picture and no caption is needed.
        strength: of the ridge, as a share of the features' mean variance.
        chunk: images, or tokens, at once.

    Raises:
        MLLMError: an unknown solver.
    """

    def __init__(
        self,
        *,
        part: str = "connector",
        solver: str = "ridge",
        targets: str = "caption-words",
        strength: float = 0.01,
        chunk: int = 64,
    ) -> None:
        super().__init__(part=part, strength=strength, chunk=chunk)
        if solver not in SOLVERS:
            raise MLLMError(f"stages.fit of connector has solver {solver!r}: expected one of {', '.join(SOLVERS)}.")
        self.solver, self.targets = solver, targets

    def problems(self, model: Model) -> list[str]:
        """Return what the model lacks, and what to give."""
        problems = []
        if model.connector is None or model.connector.linear() is None:
            problems.append("fits the connector, which does not end in a linear map: take another type.")
        if self.targets == "tokens" and not model.has(EmbedsTexts):
            problems.append("fits tokens, whose strings this encoder does not embed: encoder.type=dual-encoder.")
        if self.targets == "sentences":
            if not model.has(SentenceModel):
                problems.append("fits sentences, and the model has no vectors of them: lm.type=sentences.")
        elif not model.generates_text:
            problems.append("fits words, and this lm has sentences only: stages.fit.targets=sentences.")
        return problems

    def sums(self, model: Model) -> NormalEquations:
        """Return the sums, empty."""
        return NormalEquations(_linear(model).in_features, model.lm.dim)

    def rows(self, model: Model, data: Material) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what the map is applied to ``(N, X)``, and the embeddings ``(N, D_lm)`` that are to come of it."""
        if self.targets == "tokens":
            yield from self._tokens(model, data)
            return
        target = _Sentences(model) if self.targets == "sentences" else _Words(model, data.captioned)
        for part, seen in data.seen(self.chunk):
            yield model.connector.body(seen).mean(1), target(part)

    def solve(self, model: Model, sums: NormalEquations) -> tuple[Tensor, Tensor]:
        """Return weights ``(X, D_lm)`` and intercept ``(D_lm,)``."""
        return sums.solve(self.solver, self.strength)

    def put(self, model: Model, sums: NormalEquations, solution: tuple[Tensor, Tensor]) -> float:
        """Set the map, and return the share of the targets' variance that it explains."""
        weights, intercept = solution
        project = _linear(model)
        tokens = project.out_features // len(intercept)  # one vector may give several tokens
        project.weight.copy_(weights.T.repeat(tokens, 1))
        project.bias.copy_(intercept.repeat(tokens))
        return sums.explained(weights)

    def _tokens(self, model: Model, data: Material) -> Iterator[tuple[Tensor, Tensor]]:
        words = lexicon(model.lm)
        for start in data.track(range(0, len(words), self.chunk)):
            part = words[start : start + self.chunk]
            seen = model.encoder.embed_texts([text for _, text in part])[:, None]  # (N, 1, D_vis)
            y = model.lm.embed(torch.tensor([token for token, _ in part], device=model.lm.model.device))
            yield model.connector.body(seen).mean(1), y


class _Words:
    """The words' embeddings ``(N, D_lm)`` of items, weighted by how rare they are in all of them."""

    def __init__(self, model: Model, items: Sequence[Item]) -> None:
        self.lm, self.weight = model.lm, rarity(model.lm, items)

    def __call__(self, part: Sequence[Item]) -> Tensor:
        return torch.stack([words_embedding(self.lm, item, self.weight) for item in part])


class _Sentences:
    """The mean vectors ``(N, D_lm)`` of items' captions."""

    def __init__(self, model: Model) -> None:
        self.lm = model.lm

    def __call__(self, part: Sequence[Item]) -> Tensor:
        texts = list(dict.fromkeys(text for item in part for text in item.answers))
        vectors = dict(zip(texts, self.lm.sentences(texts), strict=True))
        return torch.stack([torch.stack([vectors[text] for text in item.answers]).mean(0) for item in part])


def _linear(model: Model) -> nn.Linear:
    linear: nn.Linear | None = model.connector.linear()
    assert linear is not None
    return linear


def words_embedding(lm: Any, item: Item, weight: dict[int, float]) -> Tensor:
    """Return the weighted mean embedding ``(D_lm,)`` of the tokens of all captions of an item."""
    ids = [token for answer in item.answers for token in lm.tokenize(answer_text(answer))]
    rarity = torch.tensor([weight[token] for token in ids], device=lm.model.device)
    embeds = lm.embed(torch.tensor(ids, device=lm.model.device)).float()  # (T, D_lm)
    return (rarity[:, None] * embeds).sum(0) / rarity.sum().clamp(min=1e-6)


def rarity(lm: Any, items: Sequence[Item]) -> dict[int, float]:
    """Return for each token log(captions / captions that hold it): words that say nothing weigh nothing."""
    captions = [lm.tokenize(answer_text(answer)) for item in items for answer in item.answers]
    counts = Counter(token for ids in captions for token in set(ids))
    return {token: math.log((1 + len(captions)) / count) for token, count in counts.items()}
