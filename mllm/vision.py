"""Take a model's images to visual tokens: the encoder, how it cuts images, and the connector.

Shapes: I images, U tiles of them (`mllm.slots`), P patches, Q visual tokens, D_vis, D_lm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mllm.capabilities import CrossAttention, ReadsQuestions
from mllm.encoders.texts import features_of, units_of
from mllm.media.native import together
from mllm.media.tiles import Cutting, Layout, whole_images
from mllm.parts import Parts
from mllm.prompts.pieces import Counts, Piece
from mllm.prompts.questions import for_units, questions_of


class Vision(Parts):
    """The parts of a model, and the way of images through encoder and connector."""

    def encoded(self, tiles: Sequence[Any]) -> Tensor:
        """Return the encoder's features ``(U, P, D_vis)`` of images' tiles (`mllm.slots.Encoder.tiles`)."""
        with torch.no_grad():
            return features_of(self.encoder, [units_of(self.encoder, [tile]) for tile in tiles], self.device)

    def features(self, images: Sequence[Any]) -> Tensor:
        """Return the encoder's features ``(I, P, D_vis)`` of images in any accepted form, each as a whole."""
        features = self.encoded([self.encoder.open(image) for image in images])
        return whole_images(features, self.layouts(images)) if self.joint else features

    def overview(self, images: Sequence[Any]) -> Tensor:
        """Return the visual tokens ``(I, Q, D_lm)`` of images in any accepted form, each as a whole."""
        opened = [self.encoder.open(image) for image in images]
        layouts = self.layouts(opened) if self.joint else None
        return self.whole(self.connect(self.encoded(opened), layouts), layouts)

    def connect(self, features: Tensor, layouts: Sequence[Layout] | None, questions: list[str] | None = None) -> Tensor:
        """Return the connector's output ``(U, Q, D_lm)`` of features ``(U, P, D_vis)`` of images' units."""
        return self.connector(self.arranged(features, layouts), *for_units(self.connector, questions, layouts))

    def questions(self, prompts: Sequence[Sequence[Piece]]) -> list[str] | None:
        """Return the question of each image of prompts; None: the connector reads images alone."""
        reads = isinstance(self.connector, ReadsQuestions)
        return [question for pieces in prompts for question in questions_of(pieces)] if reads else None

    def arranged(self, features: Tensor, layouts: Sequence[Layout] | None) -> Tensor:
        """Return features ``(U, P, D_vis)`` of images' units as the connector takes them."""
        return features if layouts is None or not self.connector.padded else together(features, layouts)

    def whole(self, tokens: Tensor, layouts: Sequence[Layout] | None) -> Tensor:
        """Return the visual tokens ``(I, Q, D_lm)`` of whole images, of the connector's output."""
        return tokens if self.connector.padded else whole_images(tokens, layouts)

    @property
    def joint(self) -> bool:
        """Whether the encoder makes cells of an image as a whole (`mllm.media.native`)."""
        return self.tiling is not None and self.tiling.joint

    @property
    def tiling(self) -> Cutting | None:
        """Return how images are cut into tiles, or videos into segments; None: they are not."""
        tiling: Cutting | None = None if self.encoder is None else self.encoder.tiling
        return tiling

    def layouts(self, images: Sequence[Any]) -> list[Layout] | None:
        """Return how images are cut into tiles; None: they are not."""
        return None if self.encoder is None else self.encoder.layouts(images)

    def tiles_of(self, images: Sequence[Any]) -> int:
        """Return the number of tiles of images together."""
        layouts = self.layouts(images)
        return len(images) if layouts is None else sum(layout.tiles for layout in layouts)

    def in_order(self, tokens: Tensor, layouts: Sequence[Layout] | None) -> Tensor:
        """Return images' visual tokens as `embed` takes them, of those of their tiles ``(U, Q, D_lm)``."""
        return tokens if layouts is None else self.connector.in_order(tokens, layouts)

    def image_features(self, images: Sequence[Any]) -> Tensor:
        """Return the encoder's features ``(U, P, D_vis)`` of all units of images."""
        return self.encoded([tile for image in images for tile in self.encoder.tiles(image)])

    def see_images(
        self, images: Sequence[Any], questions: list[str] | None = None, features: Tensor | None = None
    ) -> Tensor | None:
        """Return images' visual tokens as `embed` takes them; None: there are no images, or no encoder reads them."""
        if not images or self.encoder is None:
            return None
        layouts = self.layouts(images)
        features = self.image_features(images) if features is None else features
        return self.in_order(self.connect(features, layouts, questions), layouts)

    @property
    def cross_attention(self) -> CrossAttention | None:
        """Return the cross-attention adapter; None where the visual tokens are part of the sequence."""
        return next((adapter for adapter in self.find_all(CrossAttention).values() if adapter.tokens_per_image), None)

    @property
    def tokens_per_image(self) -> int:
        """Return the tokens of the sequence per image; where `encoder.tiles` cuts images, the most of any image."""
        if self.connector is None:
            return 0
        if (adapter := self.cross_attention) is not None:
            return adapter.tokens_per_image
        return max(map(self.connector.tokens_of, [None] if self.tiling is None else self.tiling.fullest))

    @property
    def counts(self) -> Counts:
        """Return the tokens of the sequence of an image: a number, or a function of the image."""
        tiling = self.tiling
        if tiling is None or self.connector is None:
            return self.tokens_per_image
        return lambda image: self.connector.tokens_of(tiling.of(image))

    @property
    def tiles_per_image(self) -> int:
        """Return the tiles of an image; where `encoder.tiles` cuts images, the most of any image."""
        return 1 if self.tiling is None else max(layout.tiles for layout in self.tiling.fullest)
