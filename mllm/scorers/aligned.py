"""A scorer that was trained here: a run that aligned an encoder's pictures with sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mllm.capabilities import SentenceModel
from mllm.errors import MLLMError
from mllm.model import Model
from mllm.slots import Connector

_BATCH = 64


class AlignedScorer(nn.Module):
    """The model of such a run (``mllm train emoji-scorer``), both sides of it in the space of its sentences.

    Args:
        model: the model; in a recipe, its run.

    Raises:
        MLLMError: no model there, or one that has no encoder, connector or sentences.
    """

    def __init__(self, *, model: Model) -> None:
        super().__init__()
        self.model = model
        if not model.has(Connector, SentenceModel):
            raise MLLMError(
                "The scorer's model does not put images and sentences into one space: expected a run whose lm.type "
                "is sentences, such as one of the recipe emoji-scorer."
            )

    def image_text(self, images: Sequence[Any], texts: Sequence[str]) -> Tensor:
        """Return the cosine similarities ``(I, N)`` of images and texts."""
        return self.embed_images(images) @ self.embed_texts(texts).T

    @torch.no_grad()
    def embed_images(self, images: Sequence[Any]) -> Tensor:
        """Return vectors ``(I, D)`` of length 1."""
        chunks = [images[start : start + _BATCH] for start in range(0, len(images), _BATCH)]
        seen = [self.model.connector(self.model.features(chunk)).float().mean(1) for chunk in chunks]
        return nn.functional.normalize(torch.cat(seen), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return vectors ``(N, D)`` of length 1; a text that is too long is cut."""
        vectors: Tensor = self.model.lm.sentences(texts).float()
        return vectors
