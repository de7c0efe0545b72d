"""What every closed form is: sums over rows that stream by, and a part set to their solution, without a gradient.

Memory does not grow with the rows. The kinds, one for each part that can be fitted, are in ``fits/``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mllm.capabilities import missing
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.fits.regression import NormalEquations, put
from mllm.model import Model
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
        part: the path of what is fitted: ``connector``, or ``heads.NAME``.
        strength: what is added to the sides' covariance, as a share of their mean variance.
        chunk: rows at once.
    """

    measure = "explained"  # the name of the number that it returns
    needs: Sequence[type] = ()  # contracts of `mllm.slots` that the model must have a part for

    def __init__(self, *, part: str, strength: float = 0.01, chunk: int = 64) -> None:
        self.path, self.strength, self.chunk = part, strength, chunk

    def part(self, model: Model) -> Any:
        """Return the part of the model that is fitted."""
        return model.get_submodule(self.path)

    def problems(self, model: Model) -> list[str]:
        """Return what the model lacks, and what to give; called on the meta device, too."""
        absent = [f"fits {self.path}, which the model does not have."] if self.path not in dict(model.parts()) else []
        return absent + [f"fits {self.path}, for which it needs {missing(k)}." for k in self.needs if not model.has(k)]

    def sums(self, model: Model) -> Any:
        """Return the sums, empty: ``add(x, y)`` takes rows of the widths ``x_dim`` and ``y_dim``."""
        raise NotImplementedError

    def rows(self, model: Model, data: Material) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield rows of both sides, ``(N, X)`` and ``(N, Y)``."""
        raise NotImplementedError

    def solve(self, model: Model, sums: Any) -> Any:
        """Return the sums' solution."""
        raise NotImplementedError

    def put(self, model: Model, sums: Any, solution: Any) -> float:
        """Set the part to the solution, and return how well it could be done, from 0 to 1."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self, model: Model, data: Material) -> float:
        """Fit the part, and return how well it could be done, from 0 to 1.

        Raises:
            MLLMError: the model lacks what is needed, or the data holds nothing to learn from.
        """
        for problem in self.problems(model):
            raise MLLMError(f"stages.fit {problem}")
        sums = self.sums(model)
        for x, y in self.rows(model, data):
            sums.add(x.cpu(), y.cpu())
        return self.put(model, sums, self.solve(model, sums))


class Ridge(Fit):
    """A closed form of one linear map: a ridge regression from its inputs to its targets.

    It returns the share of the targets' variance that the map explains.
    """

    def project(self, model: Model) -> nn.Linear:
        """Return the map: the part's ``project``."""
        project: nn.Linear = self.part(model).project
        return project

    def sums(self, model: Model) -> NormalEquations:
        """Return the sums, empty."""
        project = self.project(model)
        return NormalEquations(project.in_features, project.out_features)

    def solve(self, model: Model, sums: NormalEquations) -> tuple[Tensor, Tensor]:
        """Return weights ``(X, Y)`` and intercept ``(Y,)``."""
        return sums.solve("ridge", self.strength)

    def put(self, model: Model, sums: NormalEquations, solution: tuple[Tensor, Tensor]) -> float:
        """Set the map."""
        put(self.project(model), *solution)
        return sums.explained(solution[0])
