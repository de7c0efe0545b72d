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
from mllm.fits.regression import NormalEquations, put
from mllm.prompts.pieces import Piece


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
