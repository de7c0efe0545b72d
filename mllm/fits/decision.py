"""Whether to look an image up or to make it, in closed form: a ridge from states to labels.

Fisher's discriminant with a penalty. What all states share is most of their length, and slows the gradient down; here
it is taken off as their mean.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mllm.capabilities import DECISIONS, DecisionHead
from mllm.fits.base import Material, Ridge
from mllm.model import Model
from mllm.prompts.pieces import images_of
from mllm.readout.decision import labelled, states_at
from mllm.slots import LanguageModel


class DecisionFit(Ridge):
    """Sets the head's map. Examples of about one length are read together."""

    needs = (LanguageModel, DecisionHead)

    def __init__(self, *, part: str, strength: float = 0.01, chunk: int = 32) -> None:
        super().__init__(part=part, strength=strength, chunk=chunk)

    def project(self, model: Model) -> nn.Linear:
        """Return the head's map."""
        project: nn.Linear = self.part(model).judge
        return project

    def rows(self, model: Model, data: Material) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield states ``(N, D_lm)`` at the head's token, and labels ``(N, 2)``, one of a row's being 1."""
        known = [labelled(row) for row in data.examples()]
        known.sort(key=lambda example: sum(len(piece) for piece in example[0] if isinstance(piece, str)))
        for start in data.track(range(0, len(known), self.chunk)):
            prompts, labels = zip(*known[start : start + self.chunk], strict=True)
            images = [image for prompt in prompts for image in images_of(prompt)]
            states = states_at(model, prompts, model.connector(model.features(images)) if images else None)
            yield states.float(), torch.eye(len(DECISIONS))[list(labels)]
