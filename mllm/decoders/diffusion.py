"""Any text-to-image pipeline of `diffusers` that takes its text as embeddings: Stable Diffusion 1 and 2, and kin.

Notable: training by texts needs the text encoder alone, so the rest is loaded when the first image is drawn, or when a
condition is first learnt by what the pipeline makes of it.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mllm.errors import MLLMError
from mllm.hub.fingerprints import file_hash
from mllm.hub.published import configuration
from mllm.media.images import open_image

DRAWS = ("unet", "transformer", "vae", "safety_checker", "feature_extractor")  # what a text does not pass through


class DiffusionPipeline(nn.Module):
    """A frozen pipeline; a condition is what its text encoder makes of a prompt.

    Args:
        model: a folder that `diffusers` saved, or a hub id.
        steps: of denoising.
        guidance: how far away from the empty prompt it is drawn (arXiv:2207.12598); 1: not at all.
        side: pixels; None: the pipeline's own.
        dtype: of the weights.

    Attributes:
        condition: ``(L, W)`` of the text encoder's output.

    Raises:
        MLLMError: `diffusers` is not installed, or there is no such pipeline.
    """

    def __init__(
        self,
        *,
        model: str,
        steps: int = 50,
        guidance: float = 7.5,
        side: int | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> None:
        super().__init__()
        self.condition = self.shape(model=model)
        self._model, self._steps, self._guidance, self._side = model, steps, guidance, side
        self._dtype = getattr(torch, dtype)
        if torch.get_default_device().type != "meta":
            _ = self._texts

    @classmethod
    def shape(cls, *, model: str, **_: Any) -> tuple[int, int]:
        """Return ``(L, W)`` from a pipeline's configuration files.

        Raises:
            MLLMError: they are not there, or the pipeline does not take its text encoder's output as it is.
        """
        known = configuration(model)
        if known is not None and not Path(model).is_dir():
            length, width = known["condition"]
            return length, width
        text, words = _json(model, "text_encoder/config.json"), _json(model, "tokenizer/tokenizer_config.json")
        width = text.get("hidden_size", text.get("d_model"))
        taken = _json(model, "unet/config.json").get("cross_attention_dim", width)
        if not isinstance(width, int) or taken != width:
            raise MLLMError(
                f"The pipeline {model} takes conditions of width {taken}, and its text encoder makes {width}: it reads "
                "more than that. Take one of Stable Diffusion 1 or 2, or of their kin."
            )
        return int(words["model_max_length"]), width

    @property
    def label(self) -> str:
        """Return what it is called in an answer."""
        return self._model

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return what tells these weights from others."""
        whole = hashlib.sha256()
        for file in sorted(_folder(self._model).rglob("*.safetensors")):
            whole.update(f"{file.parent.name}/{file.name} {file_hash(file)}".encode())
        return whole.hexdigest()

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return the text encoder's output ``(N, L, W)``."""
        found = self._texts.encode_prompt(
            prompt=list(texts), device=self._texts.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        conditions: Tensor = found[0]
        return conditions

    @torch.no_grad()
    def draw(self, conditions: Tensor, seeds: Sequence[int]) -> list[Any]:
        """Return a PIL image for each of the conditions ``(N, L, W)``, drawn with its seed."""
        pipeline = self._whole.to(conditions.device)
        taken = conditions.to(self._dtype)
        empty = self.encode([""]).to(taken).expand_as(taken)
        size = {} if self._side is None else {"height": self._side, "width": self._side}
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        pipeline.set_progress_bar_config(disable=True)
        images: list[Any] = pipeline(
            prompt_embeds=taken,
            negative_prompt_embeds=empty,
            num_inference_steps=self._steps,
            guidance_scale=self._guidance,
            generator=draws,
            **size,
        ).images
        return images

    def denoise(self, images: Sequence[Any], conditions: Tensor) -> Tensor:
        """Return how badly noise is told from images under conditions: the loss ``(N,)`` its U-Net was trained by.

        The gradient passes through the frozen U-Net into the conditions, and no further. What is drawn (latents, noise,
        time steps) comes from torch's own generator.

        Args:
            images: that the conditions are to describe, in any accepted form.
            conditions: ``(N, L, W)``.

        Raises:
            MLLMError: it does not draw with a U-Net, or this one is to foretell what is not known here.
        """
        pipeline = self._whole.to(conditions.device)
        schedule = self._schedule
        with torch.no_grad():
            latents = self._latents([open_image(image) for image in images], conditions.device)
            noise = torch.randn_like(latents)
            steps = torch.randint(schedule.config.num_train_timesteps, (len(latents),)).to(conditions.device)
            noisy = schedule.add_noise(latents, noise, steps)
            wanted = (
                noise if schedule.config.prediction_type == "epsilon" else schedule.get_velocity(latents, noise, steps)
            )
        said = pipeline.unet(noisy, steps, encoder_hidden_states=conditions.to(self._dtype)).sample
        return (said.float() - wanted.float()).square().flatten(1).mean(1)

    def _latents(self, images: Sequence[Any], device: torch.device) -> Tensor:
        """Return latents ``(N, C, H, W)`` of pictures as the U-Net was trained on them."""
        pipeline = self._whole
        side = self._side or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        pixels = pipeline.image_processor.preprocess(list(images), height=side, width=side)
        found = pipeline.vae.encode(pixels.to(device, self._dtype)).latent_dist.sample()
        latents: Tensor = found * pipeline.vae.config.scaling_factor
        return latents

    @functools.cached_property
    def _schedule(self) -> Any:
        """Return how noise was added when the U-Net was trained; how it is taken off again may go by another scheme."""
        parts = self._whole.components
        kind = parts["scheduler"].config.get("prediction_type", "epsilon") if "unet" in parts else None
        if kind not in ("epsilon", "v_prediction"):
            found = "no U-Net" if kind is None else f"a U-Net that foretells {kind!r}"
            raise MLLMError(
                f"The pipeline {self._model} has {found}; a condition is learnt through one that foretells noise or "
                "velocity. Take Stable Diffusion 1 or 2."
            )
        return import_module("diffusers").DDPMScheduler.from_config(parts["scheduler"].config)

    @functools.cached_property
    def _texts(self) -> Any:
        """Return the pipeline without what draws."""
        index = _json(self._model, "model_index.json")
        return self._loaded(**{name: None for name in DRAWS if name in index})

    @functools.cached_property
    def _whole(self) -> Any:
        """Return the pipeline."""
        parts = {name: part for name, part in self._texts.components.items() if part is not None and name not in DRAWS}
        return self._loaded(**{name: part for name, part in parts.items() if isinstance(part, nn.Module)})

    def _loaded(self, **parts: Any) -> Any:
        try:
            diffusers = import_module("diffusers")
        except ImportError as error:
            raise MLLMError(
                f"This image decoder needs diffusers: pip install 'mllm-assembly[image]' ({error})."
            ) from None
        diffusers.utils.logging.disable_progress_bar()
        try:
            found = diffusers.DiffusionPipeline.from_pretrained(
                _folder(self._model), dtype=self._dtype, use_safetensors=True, **parts
            )
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise MLLMError(f"The pipeline {self._model} could not be loaded: {error}. Is the folder whole?") from None
        if "prompt_embeds" not in inspect.signature(type(found).__call__).parameters:
            raise MLLMError(
                f"{type(found).__name__} takes no embeddings in a prompt's place (prompt_embeds), so no head can speak "
                "to it. Take another pipeline."
            )
        for part in found.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        return found


def _folder(model: str) -> Path:
    """Return a pipeline's folder: given, or of a hub id in the local cache, or downloaded."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.txt", "*.safetensors"]))
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise MLLMError(
            f"There is no pipeline {model!r}: {first} Give a folder that diffusers saved, or a hub id within reach."
        ) from None


def _json(model: str, file: str) -> dict[str, Any]:
    path = _folder(model) / file
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise MLLMError(f"{path} cannot be read: {error}. Copy the folder again.") from None
    return found
