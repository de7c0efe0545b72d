"""Score images and texts with a trained run that aligned an image encoder with a sentence encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mllm.capabilities import SentenceModel
from mllm.errors import MLLMError
from mllm.guides.contracts import EmbedsImages
from mllm.model import Model
from mllm.slots import Connector, Scorer

_BATCH = 64


class AlignedScorer(nn.Module):
    """A scorer that compares the connector's mean visual token with vectors of texts (``mllm train emoji-scorer``).

    Args:
        model: the model, whose sentence encoder embeds the texts; in a recipe, the path of its run.
        texts: a scorer that embeds the texts instead, of a model that was aligned with its images (the objective
            ``align``, or ``fit: {targets: guide}``); in a recipe, a mapping as that of ``scorer``.

    Raises:
        MLLMError: the model has no connector, nothing embeds texts, or their vectors are of another width.
    """

    def __init__(self, *, model: Model, texts: Scorer | None = None) -> None:
        super().__init__()
        self.model, self.texts = model, texts
        if not model.has(Connector) or (texts is None and not model.has(SentenceModel)):
            raise MLLMError(
                "The scorer's model does not embed images and sentences in one space: expected a run with a connector "
                "and lm.type=sentences. Train one with: mllm train emoji-scorer."
            )
        if isinstance(texts, EmbedsImages) and texts.dim != model.width:
            raise MLLMError(
                f"The scorer's model makes vectors of width {model.width}, and those of texts have {texts.dim}: give "
                "the scorer that the model was aligned with."
            )

    @property
    def dim(self) -> int:
        """Return the width D of the vectors."""
        assert self.model.width is not None
        return self.model.width

    def image_text(self, images: Sequence[Any], texts: Sequence[str]) -> Tensor:
        """Return the cosine similarities ``(I, N)`` of images and texts."""
        return self.embed_images(images) @ self.embed_texts(texts).T

    @torch.no_grad()
    def embed_images(self, images: Sequence[Any]) -> Tensor:
        """Return vectors ``(I, D)`` of length 1."""
        chunks = [images[start : start + _BATCH] for start in range(0, len(images), _BATCH)]
        vectors = [self.model.overview(chunk).float().mean(1) for chunk in chunks]
        return nn.functional.normalize(torch.cat(vectors), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return vectors ``(N, D)`` of length 1; a text that is too long is truncated."""
        vectors: Tensor = (self.model.lm.sentences if self.texts is None else self.texts.embed_texts)(texts).float()
        return vectors
