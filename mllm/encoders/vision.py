"""Encode images with any vision model that `transformers` loads with its Auto classes.

The patch grid is derived by counting tokens, not from a list of architectures. A model returns a sequence of N tokens,
whose first ``N - h*w`` (CLS, registers) are not patches, or a feature map ``(B, D, h, w)``. Whether a model can
interpolate position embeddings, and whether it masks patches at random, is read from the signature of its forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from math import isqrt
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel

from mllm.encoders.base import PretrainedEncoder, layer_of, select_tokens, sizes_of
from mllm.encoders.preprocess import Normalization, Resize, as_bytes, bounded, normalization_of, square
from mllm.encoders.truncate import run_truncated, truncate
from mllm.errors import MLLMError
from mllm.hub import identity
from mllm.hub import loading as hub


class VisionModel(PretrainedEncoder):
    """A vision model of `transformers`, or the vision tower of a multimodal model, truncated after the layer used.

    Args:
        model: an installed part (``mllm/mobilenet-v2``), a Hub id or a folder.
        layer: an index into the hidden states; None: the model's last hidden state.
        select: ``patches`` (no CLS or register tokens), ``pooled`` (one vector: the model's pooler output, or the mean
            of the patches), ``all`` (every token).
        resolution: side of the square input in pixels; None: the image processor's.
        resize: how an image becomes a square (`mllm.encoders.preprocess.square`); None: as the image processor does.
        init: ``random`` uses the architecture with randomly initialized weights (a control).
        seed: the seed of the random weights.
        trust_remote_code: run Python code from the model's repository.

    Raises:
        MLLMError: the model cannot be loaded, has no such layer, or does not accept images of that size.
    """

    def __init__(
        self,
        *,
        model: str,
        layer: int | None = None,
        select: Literal["patches", "pooled", "all"] = "patches",
        resolution: int | None = None,
        resize: Resize | None = None,
        init: Literal["pretrained", "random"] = "pretrained",
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.layer, self.select = layer, select
        folder = hub.resolve(model, group="encoders")
        code: Any = {"trust_remote_code": trust_remote_code}
        self._load = partial(hub.load_model, AutoModel, folder, init=init, seed=seed, **code)
        self.model = self._load().get_encoder(modality="image").requires_grad_(False).eval()
        self.processor = hub.load_processor(AutoImageProcessor, folder, **code)
        self.resample = getattr(self.processor, "resample", None)
        native = _side(self.processor, self.model.config)
        self.size = resolution or native
        _check_divides(self.size, native, self.model.config)
        self.own_sizes = _scaled_sizes(self.processor, self.size / native)
        self.resize = resize or self._own_resize()
        self._normalization = self._find_normalization()
        self.set_fingerprint(
            folder,
            init,
            configuration=identity.configuration(self.model.config),
            preprocessing=identity.preprocessing(self.processor),
        )
        self._states = {} if layer is None else {"output_hidden_states": True}
        self._constant_inputs = self._find_constant_inputs()
        raw, truncated = self._truncate(model, native)
        if truncated:
            self._states = {}  # the forward pass ends before it returns them
        features, self.grid = self._tokens(raw)
        self.num_patches, self.dim = features.shape[1], features.shape[2]

    def settings(self) -> dict[str, Any]:
        """Return the settings that, with the weights, determine the features (part of the feature cache's key)."""
        settings = {"layer": self.layer, "select": self.select, "size": self.size, "resize": self.resize}
        return {**settings, "processor": self.processor.to_dict()}

    def preprocess(self, items: Sequence[Image.Image]) -> Tensor:
        """Return the pixels ``(B, 3, H, W)`` of RGB images, made square, from the model's image processor."""
        if self._normalization is not None:
            return self._normalization(self.prepared(items))
        return self._processed(items, self.resize)["pixel_values"]

    def prepared(self, items: Sequence[Image.Image]) -> Tensor:
        """Return RGB images, made square, as bytes ``(B, 3, H, W)``; `preprocess`'s pixels where the processor differs.

        What remains, the normalization, takes place where the weights are.
        """
        if self._normalization is None or self.resize == "own":
            return self.preprocess(items)
        return as_bytes(self._squares(items, self.resize))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features ``(B, P, D_vis)`` of pixels ``(B, 3, H, W)``."""
        return self._tokens(run_truncated(lambda: self._raw(pixels)))[0]

    def whole(self) -> Any:
        """Return the complete vision tower, with the current weights in the layers that are used."""
        model = self._load().get_encoder(modality="image").to(self.model.device).requires_grad_(False).eval()
        model.load_state_dict(self.model.state_dict(), strict=False)
        return model

    def _own_resize(self) -> Resize | Literal["own"]:
        """Return how the image processor makes images square, measured on two images that are not.

        ``own``: in another way than the three, so that the processor itself resizes. A processor whose images are not
        square (SigLIP 2 NaFlex) is replaced by stretching.
        """
        if self.processor is None:  # on the meta device
            return "stretch"
        random, side = np.random.default_rng(0), self.size
        shapes = [(side + 3, 2 * side + 7, 3), (side + 5, side // 2 + 1, 3)]
        probes = [Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]
        with torch.device("cpu"):
            try:
                own = [self._processed([probe], "own")["pixel_values"] for probe in probes]
            except Exception:  # it takes no images of this size
                return "stretch"
            if any(not isinstance(pixels, Tensor) or pixels.shape[2:] != (side, side) for pixels in own):
                return "stretch"
            ways: tuple[Resize, ...] = ("stretch", "crop", "pad")
            for resize in ways:
                made = [self._processed([probe], resize)["pixel_values"] for probe in probes]
                if all(map(torch.equal, own, made)):
                    return resize
        return "own"

    def _processed(self, images: Sequence[Image.Image], resize: Resize | Literal["own"]) -> Any:
        """Make images square, with the processor's resampling filter; the processor does the rest."""
        if resize == "own":
            return self.processor(images=[bounded(image) for image in images], return_tensors="pt", **self.own_sizes)
        squares = self._squares(images, resize)
        options = {name: False for name in ("do_resize", "do_center_crop", "do_pad") if hasattr(self.processor, name)}
        if hasattr(self.processor, "max_num_patches"):  # it splits images into patches itself
            options["max_num_patches"] = (self.size // self.processor.patch_size) ** 2
        return self.processor(images=squares, return_tensors="pt", **options)

    def _squares(self, images: Sequence[Image.Image], resize: Resize) -> list[Image.Image]:
        mean = np.broadcast_to(getattr(self.processor, "image_mean", None) or 0.0, 3).tolist()
        return [square(image, self.size, resize, self.resample, mean) for image in images]

    def _find_normalization(self) -> Normalization | None:
        """Return what the image processor does behind making images square; None: more than to normalize pixels."""
        if self.processor is None or self.resize == "own":  # on the meta device
            return None
        with torch.device("cpu"):
            return normalization_of(lambda image: self._processed([image], self.resize)["pixel_values"], self.size)

    def _find_constant_inputs(self) -> dict[str, Any]:
        """Return the forward's further arguments; they are the same for every image, since all have one size."""
        parameters = inspect.signature(self.model.forward).parameters
        constants: dict[str, Any] = {}
        if self.processor is not None:
            with torch.device("cpu"):  # on the meta device too: the model needs their values
                inputs = self._processed([Image.new("RGB", (self.size, self.size))], self.resize)
            constants = {key: value for key, value in inputs.items() if key in parameters and key != "pixel_values"}
            # A mask that masks nothing becomes None: on the meta device, the model could not read its values.
            constants |= {key: None for key in constants if "mask" in key and constants[key].all()}
        if "interpolate_pos_encoding" in parameters and (self.size, self.size) != sizes_of(
            self.model.config, "image_size"
        ):
            constants["interpolate_pos_encoding"] = True
        if "noise" in parameters and hasattr(self.model.config, "mask_ratio"):  # a masked autoencoder: mask nothing
            self.model.config.mask_ratio = 0.0
            constants["noise"] = torch.arange(_patches(self.model.config, self.size)).float()[None]  # keeps the order
        return constants

    def _raw(self, pixels: Tensor) -> Tensor:
        """Return the output in use: tokens ``(B, N, D)``, a map ``(B, D, h, w)`` or a pooled vector ``(B, D)``."""
        pixels = pixels.to(self.model.device)
        pixels = (pixels if self._normalization is None else self._normalization(pixels)).to(self.model.dtype)
        rows = {key: _repeated(value, pixels) for key, value in self._constant_inputs.items()}
        output = self.model(pixels, **rows, **self._states)
        if self.layer is not None:
            return layer_of(output.hidden_states, self.layer)
        pooled = getattr(output, "pooler_output", None) if self.select == "pooled" else None
        return output.last_hidden_state if pooled is None else pooled.flatten(1)

    def _truncate(self, model: str, native: int) -> tuple[Tensor, bool]:
        """Encode a blank image, and truncate the tower after the layer that is used."""
        blank = torch.zeros(1, 3, self.size, self.size)  # on the meta device
        if self.processor is not None:
            blank = self.preprocess([Image.new("RGB", (self.size, self.size))])
        self.shape = tuple(blank.shape[1:])
        try:
            return truncate(self.model, lambda: self._raw(blank))
        except MLLMError:
            raise
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            advice = "Choose a model whose forward takes pixel_values."
            if self.size != native:
                advice = (
                    f"Leave out encoder.resolution (it is {native}), or choose a model that interpolates positions."
                )
            raise MLLMError(
                f"The encoder {model!r} does not accept images of {self.size} x {self.size} pixels: {reason} {advice}"
            ) from error

    def _tokens(self, raw: Tensor) -> tuple[Tensor, tuple[int, int] | None]:
        if raw.ndim == 2:  # pooled by the model
            return rearrange(raw, "b d -> b 1 d"), None
        if raw.ndim == 4:  # a feature map
            grid: tuple[int, int] | None = (raw.shape[2], raw.shape[3])
            tokens, extra = rearrange(raw, "b d h w -> b (h w) d"), 0
        else:
            tokens = raw
            grid, extra = _grid(self.model.config, raw.shape[1], self.size)
        features = select_tokens(tokens, self.select, grid, extra)
        whole = self.select == "patches" or (self.select == "all" and extra == 0)
        return features, grid if whole else None


def _repeated(value: Any, pixels: Tensor) -> Any:
    """Return a tensor ``(1, ...)`` repeated for every image; return any other value unchanged."""
    if not isinstance(value, Tensor):
        return value
    return (value if pixels.is_meta else value.to(pixels.device)).expand(len(pixels), *value.shape[1:])


def _side(processor: Any, config: Any) -> int:
    """Return the side of the square input that a model was trained with."""
    if processor is None:  # on the meta device
        return sizes_of(config, "image_size")[0]
    if hasattr(processor, "max_num_patches"):
        return isqrt(processor.max_num_patches) * int(processor.patch_size)
    size = (processor.crop_size if getattr(processor, "do_center_crop", False) else None) or processor.size
    return int(next(size[key] for key in ("height", "shortest_edge", "longest_edge") if size[key]))


def _scaled_sizes(processor: Any, scale: float) -> dict[str, Any]:
    """Return the sizes with which an image processor gives squares of another side than its own, as options of it."""
    if processor is None or scale == 1:
        return {}
    sizes = {name: value for name, value in processor.to_dict().items() if name in ("size", "crop_size") and value}
    return {name: {edge: round(length * scale) for edge, length in value.items()} for name, value in sizes.items()}


def _check_divides(size: int, native: int, config: Any) -> None:
    patch = (sizes_of(config, "patch_size") or (1,))[0]
    if size != native and size % patch:
        below = size // patch * patch
        near = " or ".join(str(side) for side in (below, below + patch) if side)
        raise MLLMError(
            f"encoder.resolution is {size}, but the encoder's patches are {patch} pixels wide: set a multiple, {near}."
        )


def _patches(config: Any, side: int) -> int:
    height, width = sizes_of(config, "patch_size")
    return (side // height) * (side // width)


def _grid(config: Any, length: int, side: int) -> tuple[tuple[int, int] | None, int]:
    """Return the grid of a token sequence and the number of leading tokens that are not patches."""
    if sizes_of(config, "patch_size") and (patches := _patches(config, side)) <= length:
        height, width = sizes_of(config, "patch_size")
        return (side // height, side // width), length - patches
    root = isqrt(length)  # the side of the grid, of all tokens or of all but the first
    return ((root, root), length - root**2) if length - root**2 in (0, 1) else (None, 0)
