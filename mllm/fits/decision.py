"""Fit the head `decision` in closed form: a ridge regression from states to one-hot labels.

This is Fisher's linear discriminant with a penalty. The states' mean is most of their norm, which slows gradient
descent; here it is subtracted.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mllm.capabilities import DECISIONS, DecisionHead
from mllm.fits.base import Material, Ridge
from mllm.model import Model
from mllm.prompts.pieces import images_of
from mllm.readout.decision import labeled_prompt, states_at
from mllm.registry import Count, NonNegative
from mllm.slots import LanguageModel


class DecisionFit(Ridge):
    """A ridge regression of the head's linear map. Prompts of similar length share a batch."""

    needs = (LanguageModel, DecisionHead)

    def __init__(self, *, part: str, strength: NonNegative = 0.01, chunk: Count = 32) -> None:
        super().__init__(part=part, strength=strength, chunk=chunk)

    def project(self, model: Model) -> nn.Linear:
        """Return the head's linear map."""
        project: nn.Linear = self.part(model).judge
        return project

    def rows(self, model: Model, data: Material) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield states ``(N, D_lm)`` at the head's token, and one-hot labels ``(N, 2)``."""
        examples = [labeled_prompt(row) for row in data.examples()]
        examples.sort(key=lambda example: sum(len(piece) for piece in example[0] if isinstance(piece, str)))
        for start in data.track(range(0, len(examples), self.chunk)):
            prompts, labels = zip(*examples[start : start + self.chunk], strict=True)
            images = [image for prompt in prompts for image in images_of(prompt)]
            states = states_at(model, prompts, model.see_images(images, model.questions(prompts)))
            yield states.float(), torch.eye(len(DECISIONS))[list(labels)]
