"""Solve linear regressions and canonical correlations from sums over streamed rows, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Moments:
    """The mean and the deviation of rows ``(N, X)``, accumulated chunk by chunk; float64."""

    def __init__(self, dim: int) -> None:
        self.count, self._sum, self._squares = 0, *torch.zeros(2, dim, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Add rows ``(N, X)``."""
        rows = rows.detach().cpu().double()
        self.count += len(rows)
        self._sum += rows.sum(0)
        self._squares += rows.square().sum(0)

    @property
    def mean(self) -> Tensor:
        """Return the mean ``(X,)``."""
        return self._sum / self.count

    @property
    def deviation(self) -> Tensor:
        """Return the standard deviation ``(X,)``."""
        return (self._squares / self.count - self.mean.square()).clamp(min=1e-12).sqrt()


class NormalEquations:
    """The sums of a linear regression with intercept, Y ~ X W + b, accumulated chunk by chunk; float64."""

    def __init__(self, x_dim: int, y_dim: int) -> None:
        self.x_dim, self.y_dim = x_dim, y_dim
        self.count = torch.zeros((), dtype=torch.float64)
        self.x, self.y = torch.zeros(x_dim, dtype=torch.float64), torch.zeros(y_dim, dtype=torch.float64)
        self.xx = torch.zeros(x_dim, x_dim, dtype=torch.float64)
        self.xy = torch.zeros(x_dim, y_dim, dtype=torch.float64)
        self.yy = torch.zeros(y_dim, dtype=torch.float64)  # only the diagonal is needed

    def add(self, x: Tensor, y: Tensor, kept: Tensor | None = None) -> None:
        """Add rows x ``(N, X)`` and y ``(N, Y)``, or those of them that are ``kept (N,)``."""
        kept = torch.ones(len(x), 1) if kept is None else kept[:, None]
        x, y = x.double() * kept, y.double() * kept
        self.count += kept.sum()
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += y.square().sum(0)

    def merge(self, other: NormalEquations) -> None:
        """Add the rows of other sums."""
        for mine, others in zip(self._sums(), other._sums(), strict=True):
            mine += others

    def _sums(self) -> tuple[Tensor, ...]:
        return self.count, self.x, self.y, self.xx, self.xy, self.yy

    def solve(self, solver: str, strength: float, by: tuple[Moments, Moments] | None = None) -> tuple[Tensor, Tensor]:
        """Return weights ``(X, Y)`` and intercept ``(Y,)``.

        Args:
            solver: ``ridge``; ``least-squares`` (minimum norm, where there are fewer rows than columns); or
                ``procrustes``, the best orthogonal map between the standardized sides (SITTA, arXiv:2307.05591).
            strength: of the ridge penalty, as a fraction of the mean variance of X.
            by: standardizes X and Y by these moments, instead of the rows' own, and fits no intercept between them.
        """
        if by is not None:
            return self._solve_standardized(solver, strength, *by)
        x, y = self.x / self.count, self.y / self.count
        covariance = self.xx / self.count - torch.outer(x, x)
        cross = self.xy / self.count - torch.outer(x, y)
        spreads = covariance.diagonal(), self.yy / self.count - y.square()
        weights = _solve(solver, strength, covariance, cross, *(each.clamp(min=1e-12).sqrt() for each in spreads))
        return weights, y - x @ weights

    def _solve_standardized(self, solver: str, strength: float, of_x: Moments, of_y: Moments) -> tuple[Tensor, Tensor]:
        x, y = of_x.mean, of_y.mean
        far_x, far_y = self.x / self.count - x, self.y / self.count - y  # how far the rows' means are from these
        covariance = self.xx / self.count - torch.outer(x, x) - torch.outer(far_x, x) - torch.outer(x, far_x)
        cross = self.xy / self.count - torch.outer(x, y) - torch.outer(far_x, y) - torch.outer(x, far_y)
        x_spread, y_spread = of_x.deviation, of_y.deviation
        covariance, cross = covariance / x_spread[:, None] / x_spread, cross / x_spread[:, None] / y_spread
        ones = torch.ones(self.x_dim, dtype=torch.float64), torch.ones(self.y_dim, dtype=torch.float64)
        weights = _solve(solver, strength, covariance, cross, *ones) / x_spread[:, None] * y_spread
        return weights, y - x @ weights

    def explained(self, weights: Tensor, intercept: Tensor) -> float:
        """Return R^2: the share of Y's variance on these rows that ``X weights + intercept`` explains."""
        x, y = self.x / self.count, self.y / self.count
        total = (self.yy / self.count - y.square()).sum()
        covariance = self.xx / self.count - torch.outer(x, x)
        cross = self.xy / self.count - torch.outer(x, y)
        residual = total - 2 * (weights * cross).sum() + (weights * (covariance @ weights)).sum()
        residual += (y - x @ weights - intercept).square().sum()
        return float(1 - residual / total.clamp(min=1e-12))


class SeparateRegressions:
    """The sums of several regressions, each with columns of Y of its own: a row belongs to those where it is not zero.

    Args:
        x_dim: X.
        y_dims: the columns of each.
    """

    def __init__(self, x_dim: int, y_dims: Sequence[int]) -> None:
        self.x_dim, self.y_dim = x_dim, sum(y_dims)
        self._sums = [NormalEquations(x_dim, y_dim) for y_dim in y_dims]

    @property
    def count(self) -> Tensor:
        """Return the number of rows of the regression that has the fewest."""
        return torch.stack([sums.count for sums in self._sums]).min()

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows x ``(N, X)`` and y ``(N, Y)``."""
        for sums, columns in zip(self._sums, y.split([sums.y_dim for sums in self._sums], dim=1), strict=True):
            sums.add(x, columns, columns.ne(0).any(1))

    def merge(self, other: SeparateRegressions) -> None:
        """Add the rows of other sums."""
        for mine, others in zip(self._sums, other._sums, strict=True):
            mine.merge(others)

    def solve(self, solver: str, strength: float) -> tuple[Tensor, Tensor]:
        """Return weights ``(X, Y)`` and intercept ``(Y,)``; see `NormalEquations.solve`."""
        weights, intercepts = zip(*(sums.solve(solver, strength) for sums in self._sums), strict=True)
        return torch.cat(weights, dim=1), torch.cat(intercepts)

    def explained(self, weights: Tensor, intercept: Tensor) -> float:
        """Return the mean R^2 of the regressions; see `NormalEquations.explained`."""
        sizes = [sums.y_dim for sums in self._sums]
        parts = zip(self._sums, weights.split(sizes, dim=1), intercept.split(sizes), strict=True)
        return fmean(sums.explained(columns, bias) for sums, columns, bias in parts)


def _solve(
    solver: str, strength: float, covariance: Tensor, cross: Tensor, x_spread: Tensor, y_spread: Tensor
) -> Tensor:
    if solver == "procrustes":
        return _procrustes(cross, x_spread, y_spread)
    if solver == "least-squares":
        return torch.linalg.pinv(covariance, rtol=1e-10, hermitian=True) @ cross
    return _ridge(covariance, cross, strength)


def _ridge(covariance: Tensor, cross: Tensor, strength: float) -> Tensor:
    penalty = strength * covariance.diagonal().mean().clamp(min=1e-12)
    return torch.linalg.solve(covariance + penalty * torch.eye(len(covariance), dtype=torch.float64), cross)


def _procrustes(cross: Tensor, x_spread: Tensor, y_spread: Tensor) -> Tensor:
    """Return D_x^-1 U V^T D_y, where U S V^T is the correlation of the two sides, and D are their deviations."""
    left, _, right = torch.linalg.svd(cross / x_spread[:, None] / y_spread, full_matrices=False)
    return left @ right / x_spread[:, None] * y_spread


def set_linear(project: nn.Linear, weights: Tensor, intercept: Tensor) -> None:
    """Set a linear map to weights ``(X, Y)`` and intercept ``(Y,)``."""
    project.weight.copy_(weights.T)
    project.bias.copy_(intercept)


class Maps(NamedTuple):
    """Linear maps of both sides into one space, and the canonical correlation of each direction."""

    x: Tensor  # (D, X)
    x_bias: Tensor  # (D,)
    y: Tensor  # (D, Y)
    y_bias: Tensor  # (D,)
    correlations: Tensor  # (D,), in descending order


class Correlation:
    """The sums of a canonical correlation analysis of rows x ``(N, X)`` and y ``(N, Y)``; float64."""

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

    def merge(self, other: Correlation) -> None:
        """Add the rows of other sums."""
        self.count += other.count
        self.sum += other.sum
        self.squares += other.squares

    def correlations(self, maps: Maps) -> Tensor:
        """Return the correlation ``(R,)`` of the two sides on these rows, in each direction of other rows' maps."""
        mean, split, rank = self.sum / self.count, self.x_dim, len(maps.correlations)
        joint = self.squares / self.count - torch.outer(mean, mean)
        x, y = maps.x[:rank], maps.y[:rank]
        x_variance = (x @ joint[:split, :split] * x).sum(1)
        y_variance = (y @ joint[split:, split:] * y).sum(1)
        return (x @ joint[:split, split:] * y).sum(1) / (x_variance * y_variance).clamp(min=1e-24).sqrt()

    def solve(self, dim: int, strength: float) -> Maps:
        """Return maps onto the ``dim`` directions of highest correlation, scaled by it, and padded with zeros to D.

        Args:
            dim: D.
            strength: regularization: added to each side's covariance, as a fraction of its mean variance.
        """
        mean, split = self.sum / self.count, self.x_dim
        joint = self.squares / self.count - torch.outer(mean, mean)
        x_white, y_white = _whitening(joint[:split, :split], strength), _whitening(joint[split:, split:], strength)
        left, correlations, right = torch.linalg.svd(x_white @ joint[:split, split:] @ y_white, full_matrices=False)
        rank = min(dim, len(correlations))
        correlations = correlations[:rank]
        x = correlations[:, None] * (left.T[:rank] @ x_white)
        y = correlations[:, None] * (right[:rank] @ y_white)
        padding = (0, 0, 0, dim - rank)
        x, y = torch.nn.functional.pad(x, padding), torch.nn.functional.pad(y, padding)
        return Maps(x, -x @ mean[:split], y, -y @ mean[split:], correlations)


def _whitening(covariance: Tensor, strength: float) -> Tensor:
    """Return the inverse square root of a covariance."""
    penalty = strength * covariance.diagonal().mean().clamp(min=1e-12)
    values, vectors = torch.linalg.eigh(covariance)
    return vectors @ torch.diag((values.clamp(min=0) + penalty).rsqrt()) @ vectors.T
