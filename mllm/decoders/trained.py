"""A small image decoder that was trained here: a run that makes pictures of sentences' vectors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mllm.capabilities import ImageHead
from mllm.errors import MLLMError
from mllm.model import Model
from mllm.saving import read_saved


class RunDecoder(nn.Module):
    """The model of such a run (``mllm train emoji-decoder``); a condition is one sentence vector ``(1, D)``.

    Args:
        model: the model; in a recipe, its run.

    Attributes:
        condition: ``(1, D)``.

    Raises:
        MLLMError: no model there, or one that makes no pictures of sentences.
    """

    def __init__(self, *, model: Model) -> None:
        super().__init__()
        self.condition, self.model = self.shape(model=model.source), model
        self.fingerprint = model.fingerprint

    @classmethod
    def shape(cls, *, model: str) -> tuple[int, int]:
        """Return ``(1, D)``, from the run's files.

        Raises:
            MLLMError: no model there, or one that makes no pictures of sentences.
        """
        spec, _, tensors = read_saved(Path(model))
        first = tensors.get("heads.pixels.frequencies")
        if first is None or spec.lm is None or spec.lm.type != "sentences":
            raise MLLMError(
                f"The image decoder {model} makes no pictures of sentences: expected a run with the head pixels and "
                "lm.type=sentences, such as one of the recipe emoji-decoder."
            )
        return 1, int(first.shape[0])

    @property
    def label(self) -> str:
        """Return what it is called in an answer."""
        return self.model.source

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return the sentences' vectors ``(N, 1, D)``."""
        vectors: Tensor = self.model.lm.sentences(texts).float()
        return vectors.unsqueeze(1)

    @torch.no_grad()
    def draw(self, conditions: Tensor, seeds: Sequence[int]) -> list[Any]:
        """Return a PIL image for each of the conditions ``(N, 1, D)``, drawn with its seed."""
        pixels = self.model.find(ImageHead)(conditions[:, 0].float(), list(seeds))
        rows = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(np.ascontiguousarray(row)) for row in rows]
