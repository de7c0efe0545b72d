"""The closed-form start of a retrieval head: what captions' states and pictures' features have in common.

Canonical correlations, scaled by how strong they are, as in Gong et al. (arXiv:1212.4522, eq. 6 with p = 1). The sums
are accumulated as the rows stream by, so memory does not grow with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mllm.errors import MLLMError
from mllm.fit import Fit, Material, put
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
        self.count, self.x_dim, self.y_dim = 0, x_dim, y_dim
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


class Retrieval(Fit):
    """Sets the head's two maps; its scale stays. Of each picture's captions one is drawn.

    Args:
        solver: ``correlation``; there is no other.
        strength: see `Correlation.solve`.
        chunk: pictures at once.

    Raises:
        MLLMError: another solver.
    """

    told = "correlation"

    def __init__(self, *, solver: Literal["correlation"], strength: float = 0.01, chunk: int = 64) -> None:
        super().__init__(strength=strength, chunk=chunk)
        if solver != "correlation":
            raise MLLMError(f"stages.fit of heads.retrieval has solver {solver!r}: expected correlation.")

    def problems(self, model: Any) -> list[str]:
        """Return what the model has not that this needs, and what to give."""
        try:
            token_id(model)
        except MLLMError as error:
            return [f"fits the retrieval head. {error}"]
        return []

    def sums(self, model: Any) -> Correlation:
        """Return the sums, empty."""
        head = model.heads[HEAD]
        return Correlation(head.text.in_features, head.image.in_features)

    def rows(self, model: Any, data: Material) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield captions' states ``(N, D_lm)`` at the head's token, and pictures' mean features ``(N, D_vis)``."""
        which = known_tokens(model).index(model.heads[HEAD].token)
        for part, seen in data.seen(self.chunk):
            texts = [answer_text(Random(f"{data.seed}/{item.id}").choice(item.answers)) for item in part]
            yield read_texts(model, texts)[0][:, which], seen.float().mean(1)

    def solve(self, model: Any, sums: Correlation) -> Maps:
        """Return the maps."""
        return sums.solve(model.heads[HEAD].dim, self.strength)

    def put(self, model: Any, sums: Correlation, solution: Maps) -> float:
        """Set the maps, and return the mean of the correlations, as they are scaled."""
        head = model.heads[HEAD]
        put(head.text, solution.x.T, solution.x_bias)
        put(head.image, solution.y.T, solution.y_bias)
        return float(solution.correlations.mean())
