"""Generate images with a small decoder that this package trained: a run with a head that decodes sentence vectors."""

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
    """A decoder of sentence vectors (``mllm train emoji-decoder``); the condition is one vector ``(1, D)``.

    Args:
        model: the model; in a recipe, the path of its run.

    Attributes:
        condition: ``(1, D)``.

    Raises:
        MLLMError: the model does not decode sentence vectors to images.
    """

    def __init__(self, *, model: Model) -> None:
        super().__init__()
        self.condition, self.model = self.shape(model=model.source), model
        self.fingerprint = model.fingerprint

    @classmethod
    def shape(cls, *, model: str) -> tuple[int, int]:
        """Return ``(1, D)``, from the run's files.

        Raises:
            MLLMError: there is no model, or one that does not decode sentence vectors to images.
        """
        spec, _, tensors = read_saved(Path(model))
        frequencies = tensors.get("heads.pixels.frequencies")
        if frequencies is None or spec.lm is None or spec.lm.type != "sentences":
            raise MLLMError(
                f"The image decoder {model} does not generate images from sentences: expected a run with the head "
                "pixels and lm.type=sentences. Train one with: mllm train emoji-decoder."
            )
        return 1, int(frequencies.shape[0])

    @property
    def label(self) -> str:
        """Return the decoder's name in an answer."""
        return self.model.source

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return the sentences' vectors ``(N, 1, D)``."""
        vectors: Tensor = self.model.lm.sentences(texts).float()
        return vectors.unsqueeze(1)

    @torch.no_grad()
    def draw(self, conditions: Tensor, seeds: Sequence[int]) -> list[Any]:
        """Return a PIL image for each of the conditions ``(N, 1, D)``, sampled with its seed."""
        pixels = self.model.find(ImageHead)(conditions[:, 0].float(), list(seeds))
        rows = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(np.ascontiguousarray(row)) for row in rows]
