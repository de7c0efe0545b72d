"""Encode images with any image model of `timm` (the extra ``timm``, which needs torchvision).

Layers are read with timm's ``forward_intermediates``, which returns the blocks of every architecture as feature maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from mllm.devices import forked_rng
from mllm.encoders.base import PretrainedEncoder, on_meta, select_tokens
from mllm.encoders.preprocess import Resize, bounded, normalized_pixels
from mllm.encoders.truncate import run_truncated, truncate
from mllm.errors import MLLMError, near

T = TypeVar("T")
LAYER_ZERO = "encoder.layer is 0, but blocks are counted from 1, or backwards from -1. Set another layer."
TOO_FEW_BLOCKS = "encoder.layer is {layer}, but the encoder has fewer blocks. Set a layer closer to 0."


class TimmModel(PretrainedEncoder):
    """An image model of timm.

    Args:
        model: its name in timm (``nf_resnet50.ra2_in1k``, ``eva02_large_patch14_224``), with or without ``timm/``.
        layer: k > 0: the output of the k-th block; k < 0: counted from the last block, which is -1. None: the features
            before the model's classifier.
        select: ``patches``, ``pooled`` (the model's pooling; with ``layer``, the mean), ``all`` (with CLS, ...).
        resolution: side of the square input in pixels; None: the model's native resolution.
        resize: how an image becomes a square (`mllm.encoders.preprocess.square`); None: as the model's configuration
            in timm says (``crop_mode``, ``crop_pct``).
        weights: a file to load instead of the weights on the Hub.
        init: ``random`` uses randomly initialized weights (a control).
        seed: the seed of the random weights.

    Raises:
        MLLMError: timm is not installed, has no such model, or the model has no such layer or size.
    """

    def __init__(
        self,
        *,
        model: str,
        layer: int | None = None,
        select: Literal["patches", "pooled", "all"] = "patches",
        resolution: int | None = None,
        resize: Resize | None = None,
        weights: str | None = None,
        init: Literal["pretrained", "random"] = "pretrained",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.layer, self.select, self.resize = layer, select, resize
        timm = _timm()
        self.model: Any = _created(timm, model.removeprefix("timm/"), weights, init, seed)
        self.config = timm.data.resolve_model_data_config(self.model)
        architecture = self.model.pretrained_cfg.get("architecture") or model  # its tag names the weights
        self.set_fingerprint(configuration=architecture, preprocessing=self.config)
        self.size, self.model = _resized(self.model, resolution, self.config)
        self.shape = (3, self.size, self.size)
        raw, _ = explain_errors(
            lambda: truncate(self.model, lambda: self._raw(torch.zeros(1, *self.shape))), model, self.size
        )
        features, self.grid = self._tokens(raw)
        self.num_patches, self.dim = features.shape[1], features.shape[2]

    def settings(self) -> dict[str, Any]:
        """Return the settings that, with the weights, determine the features."""
        settings = {"layer": self.layer, "select": self.select, "size": self.size, "resize": self.resize}
        names = ("mean", "std", "interpolation", "crop_mode", "crop_pct")
        return settings | {name: self.config.get(name) for name in names}

    @cached_property
    def _own(self) -> Callable[[Image.Image], Tensor]:
        """The transforms of timm for evaluating the model."""
        config = {**self.config, "input_size": self.shape}
        with torch.device("cpu"):
            transform: Callable[[Image.Image], Tensor] = _timm().data.create_transform(**config, is_training=False)
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
        return self._tokens(run_truncated(lambda: self._raw(pixels)))[0]

    def _raw(self, pixels: Tensor) -> Tensor:
        weight = next(self.model.parameters())
        pixels = pixels.to(weight.device, weight.dtype)
        if self.layer is not None:
            return layer_of_blocks(self.model, pixels, self.layer, self.select)
        features = self.model.forward_features(pixels)
        return self.model.forward_head(features, pre_logits=True) if self.select == "pooled" else features

    def _tokens(self, raw: Tensor) -> tuple[Tensor, tuple[int, int] | None]:
        if raw.ndim == 4 and getattr(self.model, "output_fmt", "NCHW") == "NHWC" and self.layer is None:
            raw = rearrange(raw, "b h w d -> b d h w")
        prefix = int(getattr(self.model, "num_prefix_tokens", 0))
        return tokens_of(raw, self.select, prefix)


def layer_of_blocks(model: Any, pixels: Tensor, layer: int, select: str) -> Tensor:
    """Return the output of a block as a feature map ``(B, D, h, w)``, or with prefix tokens as tokens ``(B, N, D)``.

    Raises:
        MLLMError: the model does not return its blocks' outputs, or has fewer blocks.
    """
    if not hasattr(model, "forward_intermediates"):
        raise MLLMError(
            "encoder.layer is set, but this encoder does not return its blocks' outputs: leave out encoder.layer."
        )
    if layer == 0:
        raise MLLMError(LAYER_ZERO)
    options: dict[str, Any] = {"return_prefix_tokens": True} if select == "all" and _has_prefix(model) else {}
    index = layer - 1 if layer > 0 else layer
    try:
        outputs = model.forward_intermediates(
            pixels, indices=[index], stop_early=True, intermediates_only=True, **options
        )
    except (AssertionError, IndexError, ValueError):
        raise MLLMError(TOO_FEW_BLOCKS.format(layer=layer)) from None
    last = outputs[-1]
    if not isinstance(last, tuple):
        return last
    patches = rearrange(last[0], "b d h w -> b (h w) d")
    return torch.cat([last[1], patches], dim=1)


def tokens_of(raw: Tensor, select: str, prefix: int) -> tuple[Tensor, tuple[int, int] | None]:
    """Return features ``(B, P, D_vis)`` and their grid.

    Args:
        raw: a pooled vector ``(B, D)``, a feature map ``(B, D, h, w)``, or tokens ``(B, N, D)``.
        select: ``patches``, ``pooled`` or ``all``.
        prefix: the number of leading tokens that are not patches.
    """
    if raw.ndim == 2:
        return rearrange(raw, "b d -> b 1 d"), None
    if raw.ndim == 4:
        grid: tuple[int, int] | None = (raw.shape[2], raw.shape[3])
        raw, prefix = rearrange(raw, "b d h w -> b (h w) d"), 0
    else:
        side = round((raw.shape[1] - prefix) ** 0.5)
        grid = (side, side) if side * side == raw.shape[1] - prefix else None
    features = select_tokens(raw, select, grid, prefix)
    return features, grid if select == "patches" or (select == "all" and prefix == 0) else None


def explain_errors(run: Callable[[], T], model: str, size: int) -> T:
    """Return the result of ``run``; turn what it raises into an `MLLMError` that names the model and the size."""
    try:
        return run()
    except MLLMError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MLLMError(f"The encoder {model!r} does not accept images of {size} x {size} pixels: {reason}") from error


def _has_prefix(model: Any) -> bool:
    return bool(getattr(model, "num_prefix_tokens", 0))


def _timm() -> Any:
    try:
        import timm
        import timm.data
    except ImportError:
        raise MLLMError("encoder.type=timm needs timm: pip install 'mllm-assembly[timm]'.") from None
    return timm


def _created(timm: Any, name: str, weights: str | None, init: str, seed: int) -> Any:
    """Return a model without its classifier, with pretrained or randomly initialized weights."""
    if not timm.is_model(name):
        raise MLLMError(f"timm has no model {name!r}. {near(name, timm.list_models())}")
    load = init == "pretrained" and not on_meta()
    options = {"pretrained_cfg_overlay": {"file": weights}} if weights is not None else {}
    try:
        with forked_rng(seed):
            model: nn.Module = timm.create_model(name, pretrained=load, num_classes=0, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise MLLMError(
            f"timm could not load the weights of {name!r}: {str(error).splitlines()[0]} Give a file as encoder.weights."
        ) from error
    return model.requires_grad_(False).eval()


def _resized(model: Any, resolution: int | None, config: dict[str, Any]) -> tuple[int, Any]:
    """Return the side of the input and the model resized for it; timm interpolates the position embeddings."""
    native = int(config["input_size"][-1])
    if resolution is not None and resolution != native and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=(resolution, resolution))
    return resolution or native, model
