"""Encode images with the image tower of any `open_clip` model (the extra ``open-clip``, which needs torchvision)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from mllm.devices import forked_rng
from mllm.encoders.base import PretrainedEncoder, on_meta
from mllm.encoders.preprocess import Resize, bounded, normalized_pixels
from mllm.encoders.timm_model import LAYER_ZERO, TOO_FEW_BLOCKS, explain_errors, tokens_of
from mllm.encoders.truncate import run_truncated, truncate
from mllm.errors import MLLMError, near


class OpenClipModel(PretrainedEncoder):
    """The image tower of an open_clip model of any architecture (ViT, ResNet, or a timm model).

    Args:
        model: its name in open_clip (``RN50x16``, ``EVA01-g-14``), with or without ``open-clip/``.
        weights: a pretrained tag of open_clip (``openai``), or a file.
        layer: k > 0: the output of the k-th block (the stem of a ResNet is the first); k < 0: counted from the last
            block, which is -1. None: the output of the last block, before any pooling (CLIP RN50x16: 12 x 12 x 3072).
        select: ``patches``, ``pooled`` (the tower's pooled output; with ``layer``, the mean), ``all`` (with CLS).
        resolution: side of the square input in pixels; None: the model's native resolution.
        resize: how an image becomes a square (`mllm.encoders.preprocess.square`); None: as the model's configuration
            in open_clip says (``resize_mode``).
        init: ``random`` uses randomly initialized weights (a control).
        seed: the seed of the random weights.

    Raises:
        MLLMError: open_clip is not installed, has no such model or weights, or the model has no such layer or size.
    """

    def __init__(
        self,
        *,
        model: str,
        weights: str | None = None,
        layer: int | None = None,
        select: Literal["patches", "pooled", "all"] = "patches",
        resolution: int | None = None,
        resize: Resize | None = None,
        init: Literal["pretrained", "random"] = "pretrained",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.layer, self.select, self.resize = layer, select, resize
        name = model.removeprefix("open-clip/")
        self.model: Any
        self.model, self.config = _created(name, weights, init, resolution, seed)
        preprocessing = {key: value for key, value in self.config.items() if key != "size"}  # that of the architecture
        self.set_fingerprint(configuration=_configuration(name, self.model), preprocessing=preprocessing)
        size = self.config["size"]
        self.size = int(size if isinstance(size, int) else size[0])
        self.shape = (3, self.size, self.size)
        raw, _ = explain_errors(
            lambda: truncate(self.model, lambda: self._raw(torch.zeros(1, *self.shape))), model, self.size
        )
        self._prefix = self._count_prefix(raw)
        features, self.grid = tokens_of(raw, self.select, self._prefix)
        self.num_patches, self.dim = features.shape[1], features.shape[2]

    def settings(self) -> dict[str, Any]:
        """Return the settings that, with the weights, determine the features."""
        settings = {"layer": self.layer, "select": self.select, "size": self.size, "resize": self.resize}
        names = ("mean", "std", "interpolation", "resize_mode", "fill_color")
        return settings | {name: self.config.get(name) for name in names}

    @cached_property
    def _own(self) -> Callable[[Image.Image], Tensor]:
        """The transforms of open_clip for evaluating the model."""
        from open_clip.transform import PreprocessCfg, image_transform_v2

        transform: Callable[[Image.Image], Tensor] = image_transform_v2(PreprocessCfg(**self.config), is_train=False)
        return transform

    def preprocess(self, items: Sequence[Image.Image]) -> Tensor:
        """Return pixels ``(B, 3, H, W)`` of RGB images."""
        if self.resize is None:
            return torch.stack([self._own(bounded(image)) for image in items])
        return normalized_pixels(
            items, self.size, self.resize, self.config["mean"], self.config["std"], self.config["interpolation"]
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features ``(B, P, D_vis)`` of pixels ``(B, 3, H, W)``."""
        return tokens_of(run_truncated(lambda: self._raw(pixels)), self.select, self._prefix)[0]

    def _raw(self, pixels: Tensor) -> Tensor:
        weight = next(self.model.parameters())
        pixels = pixels.to(weight.device, weight.dtype)
        if self.layer is None and self.select == "pooled":
            return self.model(pixels)
        if self.layer == 0:
            raise MLLMError(LAYER_ZERO)
        layer = -1 if self.layer is None else self.layer
        options: dict[str, Any] = {"output_extra_tokens": True} if self.select == "all" else {}
        try:
            outputs = self.model.forward_intermediates(
                pixels, indices=[layer - 1 if layer > 0 else layer], stop_early=True, intermediates_only=True, **options
            )
        except (AssertionError, IndexError, ValueError):
            raise MLLMError(TOO_FEW_BLOCKS.format(layer=layer)) from None
        patches = outputs["image_intermediates"][-1]
        prefix = outputs.get("image_intermediates_prefix")
        if not prefix:
            return patches
        return torch.cat([prefix[-1], rearrange(patches, "b d h w -> b (h w) d")], dim=1)

    def _count_prefix(self, raw: Tensor) -> int:
        """Return the number of tokens before the patches: the tokens in excess of a square number."""
        return raw.shape[1] - int(raw.shape[1] ** 0.5) ** 2 if raw.ndim == 3 else 0


def _configuration(name: str, tower: nn.Module) -> dict[str, Any]:
    """Return an architecture's configuration, and which of the two GELUs it has: that may follow from the weights."""
    import open_clip

    config: dict[str, Any] = open_clip.get_model_config(name)
    quick = any(type(module).__name__ == "QuickGELU" for module in tower.modules())
    return {key: value for key, value in config.items() if key != "text_cfg"} | {"quick_gelu": quick}


def _created(
    name: str, weights: str | None, init: str, resolution: int | None, seed: int
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the image tower and its preprocessing configuration."""
    try:
        import open_clip
    except ImportError:
        raise MLLMError("encoder.type=open-clip needs open_clip: pip install 'mllm-assembly[open-clip]'.") from None
    if name not in open_clip.list_models():
        raise MLLMError(f"open_clip has no model {name!r}. {near(name, open_clip.list_models())}")
    load = init == "pretrained" and not on_meta()
    if load and weights is None:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise MLLMError(
            f"encoder.weights is missing: give a file, or a pretrained tag of open_clip ({name} has: {tags})."
        )
    try:
        with forked_rng(seed):
            tag, device = (weights if load else None), torch.get_default_device()
            model = open_clip.create_model(name, pretrained=tag, force_image_size=resolution, device=device)
    except (OSError, RuntimeError, ValueError) as error:
        raise MLLMError(
            f"open_clip could not load {name!r}: {str(error).splitlines()[0]} Set "
            "encoder.weights to another tag, or to a file."
        ) from error
    config = open_clip.get_model_preprocess_cfg(model)
    return model.visual.requires_grad_(False).eval(), config
