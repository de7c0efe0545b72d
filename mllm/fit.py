"""What every closed form is: sums over rows that stream by, and a part set to their solution, without a gradient.

Memory does not grow with the rows. The kinds, one for each part that can be fitted, are in ``fits/``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.prompt import Piece
from mllm.registry import lookup, made
from mllm.spec import FitSpec


@dataclass(frozen=True)
class Material:
    """What a part is fitted on.

    Args:
        items: of the stage's training data.
        features: gives ``(I, P, D_vis)`` of images.
        examples: gives the items as interleaved prompts with their targets, each once.
        readable: is given items that could not be read, and returns those that can.
        seed: of what is drawn.
        track: wraps the chunks, to show progress.
    """

    items: Sequence[Item] = ()
    features: Callable[[Sequence[Any]], Tensor] | None = None
    examples: Callable[[], Sequence[Sequence[Piece]]] = tuple
    readable: Callable[[Sequence[Item]], Sequence[Item]] = lambda items: items
    seed: int = 0
    track: Callable[[Iterable[int]], Iterable[int]] = iter

    @property
    def captioned(self) -> list[Item]:
        """Return the items with captions, those with a question left out.

        Raises:
            MLLMError: there are none.
        """
        found = [item for item in self.items if item.question is None and item.answers]
        if not found:
            raise MLLMError("stages.fit needs captions, and the training data has only questions.")
        return found

    def seen(self, chunk: int) -> Iterator[tuple[Sequence[Item], Tensor]]:
        """Yield captioned items, some at a time, with the features ``(I, P, D_vis)`` of their first pictures.

        Raises:
            MLLMError: no caption has a picture.
        """
        assert self.features is not None
        items = [item for item in self.captioned if item.images]
        if not items:
            raise MLLMError("stages.fit needs pictures with captions, and no caption of the training data has one.")
        for start in self.track(range(0, len(items), chunk)):
            part: Sequence[Item] = items[start : start + chunk]
            try:
                found = self.features([item.images[0] for item in part])
            except MLLMError:
                part = self.readable(part)
                found = self.features([item.images[0] for item in part])
            yield part, found


class Fit:
    """A closed form of one part.

    Args:
        strength: what is added to the sides' covariance, as a share of their mean variance.
        chunk: rows at once.
    """

    told = "explained"  # what the number is that it returns

    def __init__(self, *, strength: float = 0.01, chunk: int = 64) -> None:
        self.strength, self.chunk = strength, chunk

    def problems(self, model: Any) -> list[str]:
        """Return what the model has not that this needs, and what to give; called before there are weights, too."""
        raise NotImplementedError

    def sums(self, model: Any) -> Any:
        """Return the sums, empty: ``add(x, y)`` takes rows of the widths ``x_dim`` and ``y_dim``."""
        raise NotImplementedError

    def rows(self, model: Any, data: Material) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield rows of both sides, ``(N, X)`` and ``(N, Y)``."""
        raise NotImplementedError

    def solve(self, model: Any, sums: Any) -> Any:
        """Return the sums' solution."""
        raise NotImplementedError

    def put(self, model: Any, sums: Any, solution: Any) -> float:
        """Set the part to the solution, and return how well it could be done, from 0 to 1."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self, model: Any, data: Material) -> float:
        """Fit the part, and return how well it could be done, from 0 to 1.

        Raises:
            MLLMError: the model has not what is needed, or the data holds nothing to learn from.
        """
        for problem in self.problems(model):
            raise MLLMError(f"stages.fit {problem}")
        sums = self.sums(model)
        for x, y in self.rows(model, data):
            sums.add(x.cpu(), y.cpu())
        return self.put(model, sums, self.solve(model, sums))


class Ridge(Fit):
    """A closed form of one linear map: a ridge from what it is applied to, to what is to come of it.

    It returns the share of the targets' variance that the map explains.
    """

    def project(self, model: Any) -> nn.Linear:
        """Return the map."""
        raise NotImplementedError

    def sums(self, model: Any) -> NormalEquations:
        """Return the sums, empty."""
        project = self.project(model)
        return NormalEquations(project.in_features, project.out_features)

    def solve(self, model: Any, sums: NormalEquations) -> tuple[Tensor, Tensor]:
        """Return weights ``(X, Y)`` and intercept ``(Y,)``."""
        return sums.solve("ridge", self.strength)

    def put(self, model: Any, sums: NormalEquations, solution: tuple[Tensor, Tensor]) -> float:
        """Set the map."""
        put(self.project(model), *solution)
        return sums.explained(solution[0])


def fit_of(spec: FitSpec) -> Fit:
    """Return a part's closed form with its options.

    Raises:
        MLLMError: a part that has none, or options that it does not take.
    """
    fit: Fit = made(lookup("fits", spec.part.removeprefix("heads.")), f"fit of {spec.part}", **spec.options())
    return fit


class NormalEquations:
    """Sums of a linear regression with intercept, Y ~ X W + b, added to in pieces; float64."""

    def __init__(self, x_dim: int, y_dim: int) -> None:
        self.count, self.x_dim, self.y_dim = 0, x_dim, y_dim
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


def put(project: nn.Linear, weights: Tensor, intercept: Tensor) -> None:
    """Set a linear map to weights ``(X, Y)`` and intercept ``(Y,)``."""
    project.weight.copy_(weights.T)
    project.bias.copy_(intercept)
