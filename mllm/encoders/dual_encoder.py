"""Encode images with a dual encoder (CLIP, SigLIP): one vector per image, in an embedding space shared with texts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModel, AutoProcessor, BatchEncoding

from mllm.capabilities import EncodesTexts
from mllm.errors import MLLMError
from mllm.hub import identity
from mllm.hub import loading as hub
from mllm.hub.fingerprints import fingerprint
from mllm.media.images import open_image


class JointSpace(EncodesTexts):
    """A dual encoder of `transformers` (CLIP, SigLIP, ...); its features are the projected embeddings.

    Args:
        model: an installed part, a Hub id or a folder.
        seed: unused.
        trust_remote_code: run Python code from the model's repository.

    Raises:
        MLLMError: the model has no image or no text tower.
    """

    grid = None
    num_patches = 1

    def __init__(self, *, model: str, seed: int = 0, trust_remote_code: bool = False) -> None:
        super().__init__()
        self._folder = hub.resolve(model, group="scorers")
        self.pair = DualEncoder(model=model, trust_remote_code=trust_remote_code)
        if self.pair.ready:
            blank = self.preprocess([Image.new("RGB", (64, 64))])
        else:  # only the configuration is available
            side = self.pair.model.config.vision_config.image_size
            blank = torch.zeros(1, 3, side, side)
        self.shape = tuple(blank.shape[1:])
        self.dim = int(self(blank.to(self.pair.model.device)).shape[-1])

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return the fingerprint of weights, configuration, preprocessing and tokenizer."""
        return identity.fingerprint_of(fingerprint(self._folder), **self.pair.identity())

    def settings(self) -> dict[str, Any]:
        """Return the settings that, with the weights, determine the features."""
        return {"processor": self.pair.image_settings()}

    def preprocess(self, items: Sequence[Image.Image]) -> Tensor:
        """Return the pixels ``(B, 3, H, W)`` of RGB images from the model's image processor."""
        with torch.device("cpu"):
            return self.pair.pixels(items)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Return L2-normalized features ``(B, 1, D_vis)``."""
        return nn.functional.normalize(self.pair.image_vectors(pixels), dim=-1)[:, None]

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Return L2-normalized features ``(N, 1, D_vis)`` of texts, in the same space; long texts are truncated."""
        return self.pair.embed_texts(texts).to(self.pair.model.dtype)[:, None]


_BATCH = 64


class DualEncoder(nn.Module):
    """A frozen dual encoder that `transformers` loads with its Auto classes.

    Args:
        model: a Hub id or a folder.
        trust_remote_code: run Python code from the model's repository.

    Raises:
        MLLMError: the model has no image or no text tower.
    """

    def __init__(self, *, model: str, trust_remote_code: bool = False) -> None:
        super().__init__()
        folder = hub.resolve(model, group="scorers")
        self._processor = hub.load_processor(AutoProcessor, folder, trust_remote_code=trust_remote_code)
        self.model = hub.load_model(AutoModel, folder, trust_remote_code=trust_remote_code)
        self.model.requires_grad_(False).eval()
        if not hasattr(self.model, "get_image_features") or not hasattr(self.model, "get_text_features"):
            raise MLLMError(f"The scorer {model} has no image and text towers: give a dual encoder such as CLIP.")

    def image_text(self, images: Sequence[Any], texts: Sequence[str]) -> Tensor:
        """Return the cosine similarities ``(I, N)`` of images and texts."""
        return self.embed_images(images) @ self.embed_texts(texts).T

    def embed_images(self, images: Sequence[Any]) -> Tensor:
        """Return L2-normalized embeddings ``(I, D)`` of images in any accepted form."""
        return self._embed(images, self._images)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return L2-normalized embeddings ``(N, D)`` of texts; long texts are truncated."""
        return self._embed(texts, self._texts)

    @torch.no_grad()
    def _embed(self, inputs: Sequence[Any], encode: Callable[[Sequence[Any]], Any]) -> Tensor:
        batches = [inputs[start : start + _BATCH] for start in range(0, len(inputs), _BATCH)]
        return torch.cat([nn.functional.normalize(_vectors(encode(batch)).float(), dim=-1) for batch in batches])

    @functools.cached_property
    def dim(self) -> int:
        """The width D of the embeddings."""
        side = self.model.config.vision_config.image_size
        with torch.no_grad():
            return int(self.image_vectors(torch.zeros(1, 3, side, side, device=self.model.device)).shape[-1])

    @property
    def ready(self) -> bool:
        """Whether images and texts can be encoded; not if only a published model's configuration is available."""
        return self._processor is not None

    def pixels(self, images: Sequence[Any]) -> Tensor:
        """Return the pixels ``(I, 3, H, W)`` of PIL images."""
        return self._processor(images=list(images), return_tensors="pt")["pixel_values"]

    def image_vectors(self, pixels: Tensor) -> Tensor:
        """Return embeddings ``(I, D)`` of pixels, not normalized."""
        return _vectors(self.model.get_image_features(pixel_values=pixels.to(self.model.device, self.model.dtype)))

    def image_settings(self) -> dict[str, Any]:
        """Return the settings that, with the weights, determine the image embeddings."""
        settings: dict[str, Any] = self._processor.image_processor.to_dict()
        return settings

    def identity(self) -> dict[str, Any]:
        """Return what identifies the model besides its weights."""
        processor = self._processor
        return {
            "configuration": identity.configuration(self.model.config),
            "preprocessing": identity.preprocessing(getattr(processor, "image_processor", None)),
            "tokenizer": identity.tokenization(getattr(processor, "tokenizer", None)),
        }

    def _images(self, images: Sequence[Any]) -> Any:
        return self.image_vectors(self.pixels([open_image(image) for image in images]))

    def _texts(self, texts: Sequence[str]) -> Any:
        # Padded to the maximum length, as in training: SigLIP uses no attention mask, so padding affects its output.
        max_length = min(
            self._processor.tokenizer.model_max_length, self.model.config.get_text_config().max_position_embeddings
        )
        inputs = self._processor(
            text=list(texts), return_tensors="pt", padding="max_length", truncation=True, max_length=max_length
        )
        return self.model.get_text_features(**_on(inputs, self.model))


def _vectors(output: Any) -> Tensor:
    """Return embeddings ``(N, D)``; newer versions of transformers return them in an output object."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _on(inputs: BatchEncoding, model: Any) -> dict[str, Any]:
    return {name: value.to(model.device) for name, value in inputs.items()}
