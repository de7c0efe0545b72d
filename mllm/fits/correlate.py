"""The closed-form start of a retrieval head: what captions' states and pictures' features have in common.

Canonical correlations, scaled by how strong they are, as in Gong et al. (arXiv:1212.4522, eq. 6 with p = 1). The sums
are accumulated as the rows stream by, so memory does not grow with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.fit import read_chunks
from mllm.objectives.retrieval import HEAD, known_tokens, read_texts, token_id
from mllm.prompt import answer_text


class Maps(NamedTuple):
    """Linear maps of both sides into one space, and how strongly each of its directions correlates."""

    x: Tensor  # (D, X)
    x_bias: Tensor  # (D,)
    y: Tensor  # (D, Y)
    y_bias: Tensor  # (D,)
    correlations: Tensor  # (D,), the strongest first


class Correlation:
    """Sums of pairs of rows x ``(N, X)`` and y ``(N, Y)``; float64."""

    def __init__(self, x_dim: int, y_dim: int) -> None:
        self.count, self.x_dim = 0, x_dim
        self.sum = torch.zeros(x_dim + y_dim, dtype=torch.float64)
        self.squares = torch.zeros(x_dim + y_dim, x_dim + y_dim, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows of both sides."""
        both = torch.cat([x, y], dim=1).double()
        self.count += len(both)
        self.sum += both.sum(0)
        self.squares += both.T @ both

    def solve(self, dim: int, strength: float) -> Maps:
        """Return maps into the ``dim`` directions that correlate most; what is beyond either side's width is 0.

        Args:
            dim: D.
            strength: what is added to each side's covariance, as a share of its mean variance.
        """
        mean, cut = self.sum / self.count, self.x_dim
        whole = self.squares / self.count - torch.outer(mean, mean)
        x_white, y_white = _whitening(whole[:cut, :cut], strength), _whitening(whole[cut:, cut:], strength)
        left, found, right = torch.linalg.svd(x_white @ whole[:cut, cut:] @ y_white, full_matrices=False)
        kept = min(dim, len(found))
        found = found[:kept]
        x, y = found[:, None] * (left.T[:kept] @ x_white), found[:, None] * (right[:kept] @ y_white)
        rest = (0, 0, 0, dim - kept)
        x, y = torch.nn.functional.pad(x, rest), torch.nn.functional.pad(y, rest)
        return Maps(x, -x @ mean[:cut], y, -y @ mean[cut:], found)


def _whitening(covariance: Tensor, strength: float) -> Tensor:
    """Return the inverse square root of a covariance."""
    penalty = strength * covariance.diagonal().mean().clamp(min=1e-12)
    values, vectors = torch.linalg.eigh(covariance)
    return vectors @ torch.diag((values.clamp(min=0) + penalty).rsqrt()) @ vectors.T


@torch.no_grad()
def fit_head(
    model: Any,
    items: Sequence[Item],
    features: Callable[[Sequence[Any]], Tensor],
    *,
    strength: float,
    seed: int = 0,
    chunk: int = 64,
    readable: Callable[[Sequence[Item]], Sequence[Item]] = lambda items: items,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> float:
    """Set a retrieval head's two maps in closed form; its scale stays.

    Args:
        model: the assembly.
        items: pictures with captions, of which each picture's one is drawn; items with a question are left out.
        features: gives ``(I, P, D_vis)`` of images.
        strength: see `Correlation.solve`.
        seed: of the captions that are drawn.
        chunk: pictures at once.
        readable: is given a chunk that could not be read, and returns the items of it that can.
        track: wraps the chunks, to show progress.

    Returns:
        The mean of the correlations, as they are scaled.

    Raises:
        MLLMError: a model without the head, or no captions.
    """
    token_id(model)
    captioned = [item for item in items if item.question is None and item.images and item.answers]
    if not captioned:
        raise MLLMError("stages.fit needs captions, and the training data has only questions.")
    head = model.heads[HEAD]
    which = known_tokens(model).index(head.token)
    sums = Correlation(head.text.in_features, head.image.in_features)
    for part, seen in read_chunks(captioned, features, chunk, readable, track):
        texts = [answer_text(Random(f"{seed}/{item.id}").choice(item.answers)) for item in part]
        states = read_texts(model, texts)[0][:, which]
        sums.add(states.cpu(), seen.float().mean(1).cpu())
    maps = sums.solve(head.dim, strength)
    for linear, weight, bias in ((head.text, maps.x, maps.x_bias), (head.image, maps.y, maps.y_bias)):
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    return float(maps.correlations.mean())
