"""Generate images with a text-to-image pipeline of `diffusers` that accepts prompt embeddings (Stable Diffusion 1, 2).

Distillation from texts needs the text encoder alone, so the other modules are loaded when the first image is generated,
or when the denoising loss is first computed.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mllm.errors import MLLMError, first_line
from mllm.hub.fingerprints import file_hash
from mllm.hub.identity import BOOKKEEPING, fingerprint_of
from mllm.hub.published import configuration
from mllm.media.images import open_image
from mllm.registry import Count, NonNegative
from mllm.system import read_json

IMAGE_SIDE = ("unet", "transformer", "vae", "safety_checker", "feature_extractor")  # modules that encode no text


class DiffusionPipeline(nn.Module):
    """A frozen pipeline; the condition is the output of its text encoder.

    Args:
        model: a folder that `diffusers` saved, or a hub id.
        steps: denoising steps.
        guidance: the scale of classifier-free guidance (arXiv:2207.12598); 1: none.
        side: height and width in pixels; None: the pipeline's default.
        dtype: of the weights.

    Attributes:
        condition: ``(L, W)`` of the text encoder's output.

    Raises:
        MLLMError: `diffusers` is not installed, or there is no such pipeline.
    """

    _place: Tensor

    def __init__(
        self,
        *,
        model: str,
        steps: Count = 50,
        guidance: NonNegative = 7.5,
        side: Count | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> None:
        super().__init__()
        self.condition = self.shape(model=model)
        self._model, self._steps, self._guidance, self._side = model, steps, guidance, side
        self._dtype = getattr(torch, dtype)
        self.register_buffer("_place", torch.empty(0), persistent=False)  # moves with the model's other parts
        if torch.get_default_device().type != "meta":
            _ = self._text_pipeline

    @classmethod
    def shape(cls, *, model: str, **_: Any) -> tuple[int, int]:
        """Return ``(L, W)`` from a pipeline's configuration files.

        Raises:
            MLLMError: a file is missing, or the U-Net does not read the output of the one text encoder alone.
        """
        published = configuration(model)
        if published is not None and not os.path.isdir(model):
            length, width = published["condition"]
            return length, width
        text, tokenizer = _json(model, "text_encoder/config.json"), _json(model, "tokenizer/tokenizer_config.json")
        width = text.get("hidden_size", text.get("d_model"))
        expected = _json(model, "unet/config.json").get("cross_attention_dim", width)
        if not isinstance(width, int) or expected != width:
            raise MLLMError(
                f"The pipeline {model} takes conditions of width {expected}, and its text encoder makes {width}: the "
                "U-Net reads more than that. Use Stable Diffusion 1 or 2, or a fine-tuned version of them."
            )
        return int(tokenizer["model_max_length"]), width

    @property
    def label(self) -> str:
        """Return the decoder's name in an answer."""
        return self._model

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return the fingerprint of the weights, and of the configurations and tokenizer files beside them."""
        folder, digest = _folder(self._model), hashlib.sha256()
        for file in sorted(folder.rglob("*.safetensors")):
            digest.update(f"{file.parent.name}/{file.name} {file_hash(file)}".encode())
        texts = {*folder.rglob("*.json"), *folder.rglob("*.txt")}
        contents = {file.relative_to(folder).as_posix(): _content(file) for file in texts}
        return fingerprint_of(digest.hexdigest(), configuration=contents)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return the text encoder's output ``(N, L, W)``."""
        pipeline = self._text_pipeline.to(self._place.device)
        conditions: Tensor = pipeline.encode_prompt(
            prompt=list(texts), device=pipeline.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )[0]
        return conditions

    @torch.no_grad()
    def draw(self, conditions: Tensor, seeds: Sequence[int]) -> list[Any]:
        """Return a PIL image for each of the conditions ``(N, L, W)``, sampled with its seed."""
        pipeline = self._full_pipeline.to(conditions.device)
        embeds = conditions.to(self._dtype)
        unconditional = self.encode([""]).to(embeds).expand_as(embeds)
        size = {} if self._side is None else {"height": self._side, "width": self._side}
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        pipeline.set_progress_bar_config(disable=True)
        images: list[Any] = pipeline(
            prompt_embeds=embeds,
            negative_prompt_embeds=unconditional,
            num_inference_steps=self._steps,
            guidance_scale=self._guidance,
            generator=generators,
            **size,
        ).images
        return images

    def denoise(self, images: Sequence[Any], conditions: Tensor) -> Tensor:
        """Return the denoising loss ``(N,)`` of the U-Net on images under conditions.

        The gradient passes through the frozen U-Net to the conditions only. Latents, noise and time steps are sampled
        with torch's global generator.

        Args:
            images: the images that the conditions describe, in any accepted form.
            conditions: ``(N, L, W)``.

        Raises:
            MLLMError: the pipeline has no U-Net, or its U-Net predicts neither noise nor velocity.
        """
        pipeline = self._full_pipeline.to(conditions.device)
        schedule = self._noise_schedule
        with torch.no_grad():
            latents = self._latents([open_image(image) for image in images], conditions.device)
            noise = torch.randn_like(latents)
            steps = torch.randint(schedule.config.num_train_timesteps, (len(latents),)).to(conditions.device)
            noisy = schedule.add_noise(latents, noise, steps)
            target = (
                noise if schedule.config.prediction_type == "epsilon" else schedule.get_velocity(latents, noise, steps)
            )
        predicted = pipeline.unet(noisy, steps, encoder_hidden_states=conditions.to(self._dtype)).sample
        return (predicted.float() - target.float()).square().flatten(1).mean(1)

    def _latents(self, images: Sequence[Any], device: torch.device) -> Tensor:
        """Return the scaled latents ``(N, C, H, W)`` of images, as the U-Net was trained on them."""
        pipeline = self._full_pipeline
        side = self._side or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        pixels = pipeline.image_processor.preprocess(list(images), height=side, width=side)
        sample = pipeline.vae.encode(pixels.to(device, self._dtype)).latent_dist.sample()
        latents: Tensor = sample * pipeline.vae.config.scaling_factor
        return latents

    @functools.cached_property
    def _noise_schedule(self) -> Any:
        """Return the noise schedule that the U-Net was trained with (DDPM); sampling may use another scheduler."""
        components = self._full_pipeline.components
        kind = components["scheduler"].config.get("prediction_type", "epsilon") if "unet" in components else None
        if kind not in ("epsilon", "v_prediction"):
            actual = "no U-Net" if kind is None else f"a U-Net that predicts {kind!r}"
            raise MLLMError(
                f"The pipeline {self._model} has {actual}: score distillation needs a U-Net that predicts noise or "
                "velocity. Use Stable Diffusion 1 or 2."
            )
        return import_module("diffusers").DDPMScheduler.from_config(components["scheduler"].config)

    @functools.cached_property
    def _text_pipeline(self) -> Any:
        """Return the pipeline with its text encoder only."""
        index = _json(self._model, "model_index.json")
        return self._load(**{name: None for name in IMAGE_SIDE if name in index})

    @functools.cached_property
    def _full_pipeline(self) -> Any:
        """Return the whole pipeline, which shares the text encoder."""
        shared = {
            name: module
            for name, module in self._text_pipeline.components.items()
            if isinstance(module, nn.Module) and name not in IMAGE_SIDE
        }
        return self._load(**shared)

    def _load(self, **components: Any) -> Any:
        """Return the frozen pipeline, with the given components instead of its saved ones."""
        try:
            diffusers = import_module("diffusers")
        except ImportError as error:
            raise MLLMError(
                f"The image decoder diffusers cannot be imported: {error}. Install it: pip install "
                "'mllm-assembly[image]'."
            ) from None
        diffusers.utils.logging.disable_progress_bar()
        try:
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                _folder(self._model), dtype=self._dtype, use_safetensors=True, trust_remote_code=False, **components
            )
        except Exception as error:  # each component raises types of its own
            raise MLLMError(
                f"The pipeline {self._model} could not be loaded: {first_line(error)} Is the folder complete?"
            ) from None
        if "prompt_embeds" not in inspect.signature(type(pipeline).__call__).parameters:
            raise MLLMError(
                f"{type(pipeline).__name__} does not accept prompt_embeds in place of a prompt, so no head can "
                "condition it. Use another pipeline."
            )
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        return pipeline


def _folder(model: str) -> Path:
    """Return a pipeline's folder: the given one, or the download of a hub id."""
    if os.path.isdir(model):
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.txt", "*.safetensors"]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MLLMError(
            f"There is no pipeline {model!r}: {reason} Give a folder that diffusers saved, or the id of a repository "
            "that you can access."
        ) from None


def _content(file: Path) -> Any:
    """Return a configuration without bookkeeping; of a file that is none, its hash."""
    try:
        content = read_json(file)
    except ValueError:
        return file_hash(file)
    if not isinstance(content, dict):
        return content
    return {name: value for name, value in content.items() if not BOOKKEEPING.fullmatch(name)}


def _json(model: str, file: str) -> dict[str, Any]:
    path = _folder(model) / file
    try:
        content = read_json(path) if os.path.lexists(path) else {}
    except (OSError, ValueError) as error:
        raise MLLMError(f"{path} cannot be read: {error}. Copy the folder again.") from None
    if not isinstance(content, dict):
        raise MLLMError(f"{path} cannot be read: it is no JSON object. Copy the folder again.")
    return content
