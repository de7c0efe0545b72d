"""Imagine the features of an image that a text describes, by a linear map that is fitted on pairs (as Synth2 does)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mllm.encoders.texts import EncodesTexts
from mllm.errors import MLLMError
from mllm.hub.identity import joined, weights_of
from mllm.media.images import ImageSource
from mllm.media.texts import TextSource


class Imagined(EncodesTexts):
    """An image encoder, and a map to its features from those of a text encoder: images are encoded, texts imagined.

    The map is fitted on images and their captions, ``fit: {part: encoder.project}``, before a stage sees texts
    (`mllm.fits.imagined`). It makes all P features of an image from the mean feature of a text.

    Args:
        of: the image encoder, and an encoder that encodes texts.

    Attributes:
        project: the map.

    Raises:
        MLLMError: these are not two encoders, the second of which encodes texts.
    """

    def __init__(self, *, of: Sequence[nn.Module]) -> None:
        super().__init__()
        if len(of) != 2 or not isinstance(of[1], EncodesTexts):
            raise MLLMError(
                "encoder.of has to name two encoders: one of images, and one that encodes texts (type text, "
                "dual-encoder or run). Set encoder={type: imagined, of: [{model: ...}, {type: text, model: ...}]}."
            )
        self.of: Any = nn.ModuleList(of)
        images: Any = of[0]
        texts = of[1]
        self.dim, self.num_patches, self.grid, self.shape = images.dim, images.num_patches, images.grid, images.shape
        self.reads_images, self.reads_videos = images.reads_images, images.reads_videos
        self.project = nn.Linear(texts.dim, images.num_patches * images.dim)
        nn.init.zeros_(self.project.weight)  # it has no seed; until it is fitted, there is nothing to imagine
        nn.init.zeros_(self.project.bias)

    @property
    def fingerprint(self) -> str:
        """Return the joint fingerprint of the encoders; the map is trained, and saved with the trained tensors."""
        prints = [str(member.fingerprint) for member in self.of]
        weights = "".join(weights_of(each) for each in prints)
        return joined(hashlib.sha256(weights.encode()).hexdigest(), prints)

    def settings(self) -> dict[str, Any]:
        """Return the encoders' settings."""
        return {"of": [[type(member).__name__, member.settings()] for member in self.of]}

    def open(self, piece: Any) -> Any:
        """Return an image as the image encoder opens it; a text is returned as it is."""
        return piece if isinstance(piece, TextSource) else self.of[0].open(piece)

    def key(self, source: ImageSource) -> str:
        """Return the key of the image encoder."""
        return source.key() if isinstance(source, TextSource) else str(self.of[0].key(source))

    def pixels(self, piece: Any) -> int:
        """Return the number of pixels that `open` decodes."""
        return int(self.of[0].pixels(piece))

    def preprocess(self, items: Sequence[Any]) -> Tensor:
        """Return the image encoder's input."""
        pixels: Tensor = self.of[0].preprocess(items)
        return pixels

    def prepared(self, items: Sequence[Any]) -> Tensor:
        """Return the image encoder's input, in as few bytes as possible."""
        pixels: Tensor = self.of[0].prepared(items)
        return pixels

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the image encoder's features ``(B, P, D_vis)``."""
        features: Tensor = self.of[0](pixels)
        return features

    def read_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the text encoder's mean features ``(N, X)``, the input of the map."""
        vectors: Tensor = self.of[1].encode_texts(texts).float().mean(1)
        return vectors

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Return features ``(N, P, D_vis)`` of the images that texts describe."""
        features: Tensor = self.project(self.read_texts(texts)).unflatten(1, (self.num_patches, self.dim))
        return features
