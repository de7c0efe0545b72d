"""The closed-form start of a connector: a regression from features to the language model's embeddings.

For each image, x is the mean of what the connector's linear map is applied to, and y the mean embedding of its
caption's tokens, each weighted by how rare it is among captions, or the vector of the whole caption. Or, without a
picture, x is the vector of a token's string in the space that the encoder's pictures are in, and y the token's
embedding: lexical matching (SITTA, arXiv:2307.05591). The normal equations are accumulated as the rows stream by, so
memory does not grow with them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.prompt import answer_text


class NormalEquations:
    """Sums of a linear regression with intercept, Y ~ X W + b, added to in pieces; float64."""

    def __init__(self, x_dim: int, y_dim: int) -> None:
        self.count = 0
        self.x, self.y = torch.zeros(x_dim, dtype=torch.float64), torch.zeros(y_dim, dtype=torch.float64)
        self.xx = torch.zeros(x_dim, x_dim, dtype=torch.float64)
        self.xy = torch.zeros(x_dim, y_dim, dtype=torch.float64)
        self.yy = torch.zeros(y_dim, dtype=torch.float64)  # of its diagonal only the sums are needed

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows x ``(N, X)`` and y ``(N, Y)``."""
        x, y = x.double(), y.double()
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += y.square().sum(0)

    def solve(self, solver: str, strength: float) -> tuple[Tensor, Tensor]:
        """Return weights ``(X, Y)`` and intercept ``(Y,)``.

        Args:
            solver: ``ridge``; ``least-squares`` (of least norm, where there are fewer rows than columns); or
                ``procrustes``, the best orthogonal map between the standardised sides (SITTA, arXiv:2307.05591).
            strength: of the ridge's penalty, as a share of the mean variance of X.
        """
        x, y = self.x / self.count, self.y / self.count
        covariance = self.xx / self.count - torch.outer(x, x)
        cross = self.xy / self.count - torch.outer(x, y)
        if solver == "procrustes":
            weights = _procrustes(cross, covariance.diagonal(), self.yy / self.count - y.square())
        elif solver == "least-squares":
            weights = torch.linalg.pinv(covariance, rtol=1e-10, hermitian=True) @ cross
        else:
            weights = _ridge(covariance, cross, strength)
        return weights, y - x @ weights

    def explained(self, weights: Tensor) -> float:
        """Return the share of Y's variance that ``X weights`` and an intercept explain on these rows."""
        x, y = self.x / self.count, self.y / self.count
        total = (self.yy / self.count - y.square()).sum()
        covariance = self.xx / self.count - torch.outer(x, x)
        cross = self.xy / self.count - torch.outer(x, y)
        left = total - 2 * (weights * cross).sum() + (weights * (covariance @ weights)).sum()
        return float(1 - left / total.clamp(min=1e-12))


def _ridge(covariance: Tensor, cross: Tensor, strength: float) -> Tensor:
    penalty = strength * covariance.diagonal().mean().clamp(min=1e-12)
    return torch.linalg.solve(covariance + penalty * torch.eye(len(covariance), dtype=torch.float64), cross)


def _procrustes(cross: Tensor, x_variance: Tensor, y_variance: Tensor) -> Tensor:
    """Return D_x^-1/2 U V^T D_y^1/2, where U S V^T is the correlation of the two sides."""
    x_spread, y_spread = (variance.clamp(min=1e-12).sqrt() for variance in (x_variance, y_variance))
    left, _, right = torch.linalg.svd(cross / x_spread[:, None] / y_spread, full_matrices=False)
    return left @ right / x_spread[:, None] * y_spread


@torch.no_grad()
def fit_connector(
    model: Any,
    items: Sequence[Item],
    features: Callable[[Sequence[Any]], Tensor],
    *,
    solver: str,
    strength: float,
    chunk: int = 64,
    readable: Callable[[Sequence[Item]], Sequence[Item]] = lambda items: items,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
    sentences: bool = False,
) -> float:
    """Set the connector's last linear map in closed form, so that its output has the scale of embeddings.

    Every token gets the same map. What stands before the map (pooling, or a body with random weights) stays as it is.

    Args:
        model: the assembly.
        items: images with captions; items with a question are left out.
        features: gives ``(I, P, D_vis)`` of images.
        solver: see `NormalEquations.solve`.
        strength: of the ridge, as a share of the features' mean variance.
        chunk: images at once.
        readable: is given a chunk that could not be read, and returns the items of it that can.
        track: wraps the chunks, to show progress.
        sentences: the target is the vector of the whole caption, which the language model has; else of its words.

    Returns:
        The share of the targets' variance that the fit explains on these items.

    Raises:
        MLLMError: the connector does not end in a linear map, there are no captions, or the language model has not
            the vectors that are asked for.
    """
    captioned = [item for item in items if item.question is None and item.images and item.answers]
    connector = model.connector
    _refuse_unfit(connector)
    if not captioned:
        raise MLLMError("stages.fit needs captions, and the training data has only questions.")
    target = _sentences(model) if sentences else _words(model, captioned)
    sums = NormalEquations(connector.project.in_features, model.lm.dim)
    for part, seen in read_chunks(captioned, features, chunk, readable, track):
        x = connector.body(seen).mean(1)  # (N, D_vis)
        sums.add(x.cpu(), target(part).cpu())
    return _solved(connector, sums, solver, strength)


def read_chunks(
    items: Sequence[Item],
    features: Callable[[Sequence[Any]], Tensor],
    chunk: int,
    readable: Callable[[Sequence[Item]], Sequence[Item]],
    track: Callable[[Iterable[int]], Iterable[int]],
) -> Iterator[tuple[Sequence[Item], Tensor]]:
    """Yield items, some at a time, with the features ``(I, P, D_vis)`` of their first pictures; see `fit_connector`."""
    for start in track(range(0, len(items), chunk)):
        part: Sequence[Item] = items[start : start + chunk]
        try:
            seen = features([item.images[0] for item in part])
        except MLLMError:
            part = readable(part)
            seen = features([item.images[0] for item in part])
        yield part, seen


@torch.no_grad()
def fit_tokens(
    model: Any,
    *,
    solver: str,
    strength: float,
    chunk: int = 256,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> float:
    """Set the connector's last linear map by lexical matching: no picture and no caption is needed.

    Args:
        model: the assembly; its encoder puts texts into the space of its pictures.
        solver: see `NormalEquations.solve`.
        strength: of the ridge, as a share of the mean variance of the texts' vectors.
        chunk: tokens at once.
        track: wraps the chunks, to show progress.

    Returns:
        The share of the embeddings' variance that the fit explains.

    Raises:
        MLLMError: the connector does not end in a linear map, or the encoder has no texts.
    """
    _refuse_unfit(model.connector)
    if not hasattr(model.encoder, "embed_texts"):
        raise MLLMError(
            "stages.fit.targets=tokens needs an encoder that has texts in the space of its pictures: "
            "encoder.type=dual-encoder."
        )
    words = lexicon(model.lm)
    sums = NormalEquations(model.connector.project.in_features, model.lm.dim)
    for start in track(range(0, len(words), chunk)):
        part = words[start : start + chunk]
        seen = model.encoder.embed_texts([text for _, text in part])[:, None]  # (N, 1, D_vis)
        y = model.lm.embed(torch.tensor([token for token, _ in part], device=model.lm.model.device))
        sums.add(model.connector.body(seen).mean(1).cpu(), y.cpu())
    return _solved(model.connector, sums, solver, strength)


def lexicon(lm: Any) -> list[tuple[int, str]]:
    """Return the tokens that are words or parts of words, with their strings."""
    texts = ((token, lm.decode([token]).strip()) for token in range(len(lm.tokenizer)))
    return [(token, text) for token, text in texts if text.isprintable() and any(map(str.isalpha, text))]


def _refuse_unfit(connector: Any) -> None:
    if not can_be_fitted(connector):
        raise MLLMError("stages.fit needs a connector that ends in a linear map, such as connector.type=linear.")


def _solved(connector: Any, sums: NormalEquations, solver: str, strength: float) -> float:
    """Set the last map to the solution, and return the share of the variance that it explains."""
    weights, intercept = sums.solve(solver, strength)
    _set(connector.project, weights, intercept)
    return sums.explained(weights)


def _words(model: Any, items: Sequence[Item]) -> Callable[[Sequence[Item]], Tensor]:
    """Return what gives the words' embeddings ``(N, D_lm)`` of items, weighted by how rare they are in all of them."""
    if not model.speaks:
        raise MLLMError("stages.fit.targets=caption-words needs a language model's words: lm.type=transformers.")
    weight = rarity(model.lm, items)
    return lambda part: torch.stack([words_embedding(model.lm, item, weight) for item in part])


def _sentences(model: Any) -> Callable[[Sequence[Item]], Tensor]:
    """Return what gives the mean vectors ``(N, D_lm)`` of items' captions."""
    if not hasattr(model.lm, "sentences"):
        raise MLLMError("stages.fit.targets=sentences needs vectors of whole sentences: lm.type=sentences.")

    def means(part: Sequence[Item]) -> Tensor:
        texts = list(dict.fromkeys(text for item in part for text in item.answers))
        vectors = dict(zip(texts, model.lm.sentences(texts), strict=True))
        return torch.stack([torch.stack([vectors[text] for text in item.answers]).mean(0) for item in part])

    return means


def can_be_fitted(connector: Any) -> bool:
    """Whether a connector is a ``body`` and a linear map, ``project``, behind it."""
    return hasattr(connector, "body") and isinstance(getattr(connector, "project", None), torch.nn.Linear)


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


def _set(project: torch.nn.Linear, weights: Tensor, intercept: Tensor) -> None:
    tokens = project.out_features // len(intercept)  # one vector may give several tokens
    project.weight.copy_(weights.T.repeat(tokens, 1))
    project.bias.copy_(intercept.repeat(tokens))
