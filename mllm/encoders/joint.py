"""The image side of a dual encoder as an encoder: one vector a picture, in the space that texts are in too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mllm import hub
from mllm.encoder import Encoder
from mllm.scorer import DualEncoder


class JointSpace(Encoder):
    """A dual encoder of `transformers` (CLIP, SigLIP, ...), behind its projection.

    Args:
        model: an installed part, a hub id or a folder.
        seed: not used.

    Raises:
        MLLMError: the model has no image or no text tower.
    """

    grid = None
    num_patches = 1

    def __init__(self, *, model: str, seed: int = 0) -> None:
        super().__init__()
        self._folder = hub.resolve(model, group="scorers")
        self.pair = DualEncoder(model=model)
        if self.pair.ready:
            blank = self.preprocess([Image.new("RGB", (64, 64))])
        else:  # only its configuration is here
            side = self.pair.model.config.vision_config.image_size
            blank = torch.zeros(1, 3, side, side)
        self.shape = tuple(blank.shape[1:])
        self.dim = int(self(blank.to(self.pair.model.device)).shape[-1])

    @property
    def fingerprint(self) -> str:
        """Return what tells these weights from others."""
        return hub.fingerprint(self._folder)

    def settings(self) -> dict[str, Any]:
        """Return what, beside the weights, decides the features."""
        return {"processor": self.pair.image_settings()}

    def preprocess(self, items: Sequence[Image.Image]) -> Tensor:
        """Return pixels ``(B, 3, H, W)`` of RGB images, as the model's own image processor makes them."""
        with torch.device("cpu"):
            return self.pair.pixels(items)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Return features ``(B, 1, D_vis)`` of length 1."""
        return nn.functional.normalize(self.pair.image_vectors(pixels), dim=-1)[:, None]

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return vectors ``(N, D_vis)`` of length 1, in the same space."""
        return self.pair.embed_texts(texts)
