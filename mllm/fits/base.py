"""Fit a part in closed form: accumulate sums over streamed rows, solve, and set the part to the solution.

No gradient is computed, and memory does not grow with the number of rows. This folder has one class for each part that
can be fitted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mllm.capabilities import missing
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.fits.regression import NormalEquations, set_linear
from mllm.model import Model
from mllm.prompts.pieces import Piece
from mllm.registry import Count, NonNegative

HELD_OUT = 0.1  # the share of each chunk's rows that a fit is measured on


@dataclass(frozen=True)
class Material:
    """The data that a part is fitted on.

    Args:
        items: the stage's training data.
        features: returns the features ``(I, P, D_vis)`` of images.
        examples: returns the items as interleaved prompts with their targets, each once.
        readable: filters items of which some image could not be read; it returns the readable ones.
        seed: for random choices.
        track: wraps the iteration over chunks, to show progress.
    """

    items: Sequence[Item] = ()
    features: Callable[[Sequence[Any]], Tensor] | None = None
    examples: Callable[[], Sequence[Sequence[Piece]]] = tuple
    readable: Callable[[Sequence[Item]], Sequence[Item]] = lambda items: items
    seed: int = 0
    track: Callable[[Iterable[int]], Iterable[int]] = iter

    @property
    def captioned(self) -> list[Item]:
        """Return the items with captions and without a question.

        Raises:
            MLLMError: there are none.
        """
        items = [item for item in self.items if item.question is None and item.answers]
        if not items:
            raise MLLMError(
                "stages.fit needs captions, and the training data has only questions. Add a source with captions."
            )
        return items

    @property
    def answered(self) -> list[Item]:
        """Return the items with captions, and those with answers to questions.

        Raises:
            MLLMError: there are none.
        """
        items = [item for item in self.items if item.answers]
        if not items:
            raise MLLMError(
                "stages.fit needs captions or answers, and the training data has none. Add a source with some."
            )
        return items

    @property
    def shown(self) -> list[Item]:
        """Return the items with images, whatever is asked about them.

        Raises:
            MLLMError: there are none.
        """
        items = [item for item in self.items if item.images]
        if not items:
            raise MLLMError("stages.fit needs images, and the training data has none. Add a source with images.")
        return items

    def with_features(self, chunk: int, items: Sequence[Item] | None = None) -> Iterator[tuple[Sequence[Item], Tensor]]:
        """Yield items in chunks, with the features ``(I, P, D_vis)`` of their first images; None: captioned ones.

        Raises:
            MLLMError: none of them has an image.
        """
        assert self.features is not None
        items = [item for item in (self.captioned if items is None else items) if item.images]
        if not items:
            raise MLLMError(
                "stages.fit needs images with captions, and no caption of the training data has an image. Add a source "
                "with both."
            )
        for start in self.track(range(0, len(items), chunk)):
            part: Sequence[Item] = items[start : start + chunk]
            try:
                features = self.features([item.images[0] for item in part])
            except MLLMError:
                part = self.readable(part)
                features = self.features([item.images[0] for item in part])
            yield part, features


class ClosedForm:
    """The base class of closed-form fits of one part; the contract is `mllm.slots.Fit`.

    Args:
        part: the path of the part: ``connector``, or ``heads.NAME``.
        strength: regularization: added to the covariance, as a fraction of the mean variance.
        chunk: rows that are computed at once.
    """

    measure = "explained"  # the log key of the returned measure, which is taken on rows held out of a first solution
    needs: Sequence[type] = ()  # contracts of `mllm.slots` that the model must have a part for

    def __init__(self, *, part: str, strength: NonNegative = 0.01, chunk: Count = 64) -> None:
        self.path, self.strength, self.chunk = part, strength, chunk

    def part(self, model: Model) -> Any:
        """Return the part of the model to fit."""
        return model.get_submodule(self.path)

    def problems(self, model: Model) -> list[str]:
        """Return which parts the model lacks, and how a recipe gives them; also called on the meta device."""
        absent = [f"fits {self.path}, which the model does not have."] if self.path not in dict(model.parts()) else []
        return absent + [f"fits {self.path}, for which it needs {missing(k)}." for k in self.needs if not model.has(k)]

    def sums(self, model: Model) -> Any:
        """Return empty sums, such as those of `mllm.fits.regression`."""
        raise NotImplementedError

    def rows(self, model: Model, data: Material) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs ``(N, X)`` and targets ``(N, Y)``, chunk by chunk."""
        raise NotImplementedError

    def solve(self, model: Model, sums: Any) -> Any:
        """Return the solution of the regression."""
        raise NotImplementedError

    def quality(self, sums: Any, solution: Any) -> float:
        """Return the measure of a solution on the rows of these sums, 1 at most."""
        raise NotImplementedError

    def apply(self, model: Model, solution: Any) -> None:
        """Set the part to the solution."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self, model: Model, data: Material) -> float:
        """Fit the part on all rows, and return the measure of a fit without the last tenth of each chunk, on that.

        Where that leaves fewer than two rows, the measure is taken on the rows that were fitted.

        Raises:
            MLLMError: the model lacks a part that the fit needs, or the data has no example to fit on.
        """
        for problem in self.problems(model):
            raise MLLMError(f"stages.fit {problem}")
        sums, held_out = self.sums(model), self.sums(model)
        for x, y in self.rows(model, data):
            x, y = x.cpu(), y.cpu()
            fitted = len(x) - math.ceil(HELD_OUT * len(x)) if len(x) > 1 else len(x)
            sums.add(x[:fitted], y[:fitted])
            held_out.add(x[fitted:], y[fitted:])
        first = self.solve(model, sums) if held_out.count > 1 else None
        sums.merge(held_out)
        solution = self.solve(model, sums)
        self.apply(model, solution)
        return self.quality(sums, solution) if first is None else self.quality(held_out, first)


class Ridge(ClosedForm):
    """A ridge regression of one linear map, from its inputs to its targets.

    Its measure is the share of the targets' variance that the map explains on held-out rows (R^2).
    """

    def project(self, model: Model) -> nn.Linear:
        """Return the linear map: the part's ``project``."""
        project: nn.Linear = self.part(model).project
        return project

    def sums(self, model: Model) -> NormalEquations:
        """Return empty sums."""
        project = self.project(model)
        return NormalEquations(project.in_features, project.out_features)

    def solve(self, model: Model, sums: NormalEquations) -> tuple[Tensor, Tensor]:
        """Return weights ``(X, Y)`` and intercept ``(Y,)``."""
        return sums.solve("ridge", self.strength)

    def quality(self, sums: NormalEquations, solution: tuple[Tensor, Tensor]) -> float:
        """Return R^2."""
        return sums.explained(*solution)

    def apply(self, model: Model, solution: tuple[Tensor, Tensor]) -> None:
        """Set the linear map."""
        set_linear(self.project(model), *solution)
