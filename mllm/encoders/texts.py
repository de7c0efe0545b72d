"""Encode texts that stand in images' places: what an encoder of texts can do, and images and texts in their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mllm.media.texts import TextSource
from mllm.slots import Encoder


class EncodesTexts(Encoder):
    """An encoder that also encodes texts: ``encoder: {type: dual-encoder, model: ...}``.

    A text in an image's place (``see: text``) gets features of the same shape, in the same space. Only an encoder of
    texts alone is given the texts, as `TextSource`s, by `preprocess`, and may train on them.

    Attributes:
        texts_alone: whether it encodes nothing but texts.
    """

    texts_alone = False

    def open(self, piece: Any) -> Any:
        """Return a text as it is, and an image opened."""
        return piece if isinstance(piece, TextSource) else super().open(piece)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Return features ``(N, P, D_vis)`` of texts."""
        raise NotImplementedError


@runtime_checkable
class ImaginesFeatures(Protocol):
    """An encoder with a fitted map from texts to features: ``encoder: {type: imagined, of: [...]}``."""

    project: Any  # nn.Linear, of the texts' vectors (N, X) to the features (N, P D_vis)

    def read_texts(self, texts: Sequence[str]) -> Tensor:
        """Return vectors ``(N, X)`` of texts."""


def features_of(encoder: Any, opened: Sequence[Any], device: torch.device) -> Tensor:
    """Return an encoder's features ``(U, P, D_vis)`` of opened images' tiles, and of texts in images' places.

    Args:
        encoder: one that is given a text is an `EncodesTexts`: any other has refused to open it.
        opened: tiles, and `TextSource`s.
        device: of the encoder.
    """
    texts = [number for number, tile in enumerate(opened) if isinstance(tile, TextSource)]
    images = [number for number, tile in enumerate(opened) if not isinstance(tile, TextSource)]
    parts = []
    if texts:
        parts.append(encoder.encode_texts([opened[number].text for number in texts]).to(device))
    if images or not texts:
        parts.append(encoder(encoder.preprocess([opened[number] for number in images]).to(device)))
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor([*texts, *images], device=device).argsort()
    return torch.cat(parts)[order]
