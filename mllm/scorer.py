"""A scorer: image and text into one space. Any dual encoder of `transformers` (CLIP, SigLIP, ALIGN, ...)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoProcessor, BatchEncoding

from mllm import hub
from mllm.errors import MLLMError
from mllm.images import open_image


class DualEncoder(nn.Module):
    """A frozen pair of towers that `transformers` loads with its Auto classes.

    Args:
        model: a hub id or a folder.

    Raises:
        MLLMError: the model has no image or no text tower.
    """

    def __init__(self, *, model: str) -> None:
        super().__init__()
        folder = hub.resolve(model, group="scorers")
        self._processor = hub.load_processor(AutoProcessor, folder)
        self.model = hub.load_model(AutoModel, folder).requires_grad_(False).eval()
        if not hasattr(self.model, "get_image_features") or not hasattr(self.model, "get_text_features"):
            raise MLLMError(f"The scorer {model} has no image and text towers; expected a dual encoder such as CLIP.")

    @torch.no_grad()
    def image_text(self, images: Sequence[Any], texts: Sequence[str]) -> Tensor:
        """Return the cosine similarities ``(I, N)`` of images and texts."""
        pixels = self._processor(images=[open_image(image) for image in images], return_tensors="pt")
        words = self._processor(text=list(texts), return_tensors="pt", padding=True, truncation=True)
        image = _vectors(self.model.get_image_features(**_on(pixels, self.model)))
        text = _vectors(self.model.get_text_features(**_on(words, self.model)))
        return nn.functional.normalize(image, dim=-1) @ nn.functional.normalize(text, dim=-1).T


def _vectors(found: Any) -> Tensor:
    """Return ``(N, D)``; newer versions of transformers return an output object."""
    return found if isinstance(found, Tensor) else found.pooler_output


def _on(inputs: BatchEncoding, model: Any) -> dict[str, Any]:
    return {name: value.to(model.device) for name, value in inputs.items()}
