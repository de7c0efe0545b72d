"""Encode texts that stand in images' places: what an encoder of texts can do, and images and texts in their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mllm.devices import moved
from mllm.media.texts import TextSource
from mllm.slots import Encoder

Units = Tensor | TextSource  # what an encoder takes of an image: of its tiles (U, ...); or the text in its place


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


def units_of(encoder: Encoder, tiles: Sequence[Any]) -> Units:
    """Return an image's opened tiles as `features_of` takes them: prepared by threads; or the text in its place."""
    return tiles[0] if isinstance(tiles[0], TextSource) else encoder.prepared(tiles)


def features_of(encoder: Any, images: Sequence[Units], device: torch.device, chunk: int | None = None) -> Tensor:
    """Return an encoder's features ``(U, P, D_vis)`` of images, and of texts in images' places.

    Args:
        encoder: one that is given a text is an `EncodesTexts`: any other has refused to open it.
        images: the units of each.
        device: of the encoder.
        chunk: the most units of a forward pass, unless the encoder makes cells of whole images; None: all.
    """
    texts = [image.text for image in images if isinstance(image, TextSource)]
    pixels = [image for image in images if isinstance(image, Tensor)]
    rows: list[Tensor] = []
    if pixels:
        whole = torch.cat([moved(image, device) for image in pixels])
        joint = encoder.tiling is not None and encoder.tiling.joint
        parts = whole.split(len(whole) if joint or chunk is None else chunk)
        rows = [encoder(part) for part in parts]
    if not texts:
        return torch.cat(rows)
    of_texts = iter(encoder.encode_texts(texts).to(device).split(1))
    of_images = iter(torch.cat(rows).split(list(map(len, pixels))) if rows else ())
    return torch.cat([next(of_texts if isinstance(image, TextSource) else of_images) for image in images])
