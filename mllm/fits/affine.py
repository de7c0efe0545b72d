"""Fit the head `affine` in closed form: from states after captions to the conditions of the decoder's text encoder."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from mllm.fits.base import Material, Ridge
from mllm.model import Model
from mllm.prompts.pieces import answer_text
from mllm.readout.states import read_texts
from mllm.registry import Count, NonNegative
from mllm.slots import ImageDecoder, LanguageModel


class AffineFit(Ridge):
    """A ridge regression of the head's linear map. Each distinct caption is one row; no image is opened."""

    needs = (LanguageModel, ImageDecoder)

    def __init__(self, *, part: str, strength: NonNegative = 0.01, chunk: Count = 256) -> None:
        super().__init__(part=part, strength=strength, chunk=chunk)

    def rows(self, model: Model, data: Material) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield captions' states ``(N, r D_lm)`` and the text encoder's output ``(N, L W)``."""
        texts = list(dict.fromkeys(text.strip() for item in data.captioned for text in item.answers))
        for start in data.track(range(0, len(texts), self.chunk)):
            chunk = texts[start : start + self.chunk]
            states, _, _ = read_texts(model, [answer_text(text) for text in chunk])
            yield states.flatten(1).float(), model.find(ImageDecoder).encode(chunk).flatten(1).float()
