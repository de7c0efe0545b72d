"""Any vision model that `transformers` loads by its Auto classes.

Notable: what is a grid and what is not is counted, not known by name. A model returns a sequence, whose first
``P - h*w`` tokens (CLS, registers) are no patches, or a map ``(B, D, h, w)``, all of which are. What a model can do is
read off its forward: whether it interpolates positions, and whether it masks patches at random.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from math import isqrt
from typing import Any, Literal

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel

from mllm.encoders.base import PretrainedEncoder, layer_of, selected, sizes_of
from mllm.encoders.truncate import cut, until
from mllm.errors import MLLMError
from mllm.hub import loading as hub


class VisionModel(PretrainedEncoder):
    """A vision model of `transformers`, or the vision tower of a model with several, cut after what is used.

    Args:
        model: an installed part (``mllm/mobilenet-v2``), a hub id or a folder.
        layer: index into the hidden states; None: the model's own output.
        select: ``patches`` (no CLS or register tokens), ``pooled`` (one vector: the model's own, or the mean of the
            patches), ``all`` (every token).
        resolution: side of the square input in pixels; None: the image processor's.
        init: ``random`` cacheable the architecture and draws new weights (a control).
        seed: of the random weights.

    Raises:
        MLLMError: it cannot be loaded, has no such layer, or takes no picture of that size.
    """

    def __init__(
        self,
        *,
        model: str,
        layer: int | None = None,
        select: Literal["patches", "pooled", "all"] = "patches",
        resolution: int | None = None,
        init: Literal["pretrained", "random"] = "pretrained",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.layer, self.select = layer, select
        folder = hub.resolve(model, group="encoders")
        self._load = partial(hub.load_model, AutoModel, folder, init=init, seed=seed)
        self.model = self._load().get_encoder(modality="image").requires_grad_(False).eval()
        self.processor = hub.load_processor(AutoImageProcessor, folder)
        native = _side(self.processor, self.model.config)
        self.size = resolution or native
        _check_divides(self.size, native, self.model.config)
        self.set_fingerprint(folder, init)
        self._states = {} if layer is None else {"output_hidden_states": True}
        self._constant = self._constants()
        raw, cuts = self._try(model, native)
        if cuts:
            self._states = {}  # the forward ends before they would be returned
        features, self.grid = self._tokens(raw)
        self.num_patches, self.dim = features.shape[1], features.shape[2]

    def settings(self) -> dict[str, Any]:
        """Return what, beside the weights, decides the features: part of a cache's key."""
        return {"layer": self.layer, "select": self.select, "size": self.size, "processor": self.processor.to_dict()}

    def preprocess(self, items: Sequence[Image.Image]) -> Tensor:
        """Return pixels ``(B, 3, H, W)`` of RGB images, as the model's own image processor makes them.

        The whole picture is seen: it is resized to the square, not cropped.
        """
        return self._processed(items)["pixel_values"]

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features ``(B, P, D_vis)`` of pixels ``(B, 3, H, W)``."""
        return self._tokens(until(lambda: self._raw(pixels)))[0]

    def whole(self) -> Any:
        """Return the tower with what was cut off; what is in use has the weights it has now."""
        model = self._load().get_encoder(modality="image").to(self.model.device).requires_grad_(False).eval()
        model.load_state_dict(self.model.state_dict(), strict=False)
        return model

    def _processed(self, images: Sequence[Image.Image]) -> Any:
        """Resize with the processor's own filter, and leave the rest to it."""
        sample = getattr(self.processor, "resample", None)
        squares = [image.resize((self.size, self.size), sample) for image in images]
        options = {name: False for name in ("do_resize", "do_center_crop", "do_pad") if hasattr(self.processor, name)}
        if hasattr(self.processor, "max_num_patches"):  # it cuts pictures to patches by itself
            options["max_num_patches"] = (self.size // self.processor.patch_size) ** 2
        return self.processor(images=squares, return_tensors="pt", **options)

    def _constants(self) -> dict[str, Any]:
        """Return what else the forward takes; it is the same for every picture, since all are of one size."""
        takes = inspect.signature(self.model.forward).parameters
        found: dict[str, Any] = {}
        if self.processor is not None:
            with torch.device("cpu"):  # on paper too: they are no shapes but numbers that the model reads
                made = self._processed([Image.new("RGB", (self.size, self.size))])
            found = {key: value for key, value in made.items() if key in takes and key != "pixel_values"}
            found |= {
                key: None for key in found if "mask" in key and found[key].all()
            }  # on paper, none can look into it
        if "interpolate_pos_encoding" in takes and (self.size, self.size) != sizes_of(self.model.config, "image_size"):
            found["interpolate_pos_encoding"] = True
        if "noise" in takes and hasattr(self.model.config, "mask_ratio"):  # a masked autoencoder: it sees everything,
            self.model.config.mask_ratio = 0.0
            found["noise"] = torch.arange(_patches(self.model.config, self.size)).float()[None]  # in order
        return found

    def _raw(self, pixels: Tensor) -> Tensor:
        """Return the tensor that features are taken from: tokens ``(B, N, D)``, a map or a pooled vector."""
        pixels = pixels.to(self.model.device, self.model.dtype)
        rows = {key: _repeated(value, pixels) for key, value in self._constant.items()}
        output = self.model(pixels, **rows, **self._states)
        if self.layer is not None:
            return layer_of(output.hidden_states, self.layer)
        pooled = getattr(output, "pooler_output", None) if self.select == "pooled" else None
        return output.last_hidden_state if pooled is None else pooled.flatten(1)

    def _try(self, model: str, native: int) -> tuple[Tensor, bool]:
        """Encode a blank picture, and cut the tower after what is used of it."""
        blank = torch.zeros(1, 3, self.size, self.size)  # on paper
        if self.processor is not None:
            blank = self.preprocess([Image.new("RGB", (self.size, self.size))])
        self.shape = tuple(blank.shape[1:])
        try:
            return cut(self.model, lambda: self._raw(blank))
        except MLLMError:
            raise
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            advice = "Give one whose forward takes pixel_values."
            if self.size != native:
                advice = f"Leave out encoder.resolution (its own is {native}), or take a model that interpolates."
            raise MLLMError(
                f"The encoder {model!r} does not take a picture of {self.size} x {self.size} pixels: {reason} {advice}"
            ) from error

    def _tokens(self, raw: Tensor) -> tuple[Tensor, tuple[int, int] | None]:
        if raw.ndim == 2:  # pooled by the model
            return rearrange(raw, "b d -> b 1 d"), None
        if raw.ndim == 4:  # a map
            grid: tuple[int, int] | None = (raw.shape[2], raw.shape[3])
            tokens, extra = rearrange(raw, "b d h w -> b (h w) d"), 0
        else:
            tokens = raw
            grid, extra = _grid(self.model.config, raw.shape[1], self.size)
        features = selected(tokens, self.select, grid, extra)
        whole = self.select == "patches" or (self.select == "all" and extra == 0)
        return features, grid if whole else None


def _repeated(value: Any, pixels: Tensor) -> Any:
    """Return a tensor ``(1, ...)`` as often as there are pictures; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return (value if pixels.is_meta else value.to(pixels.device)).expand(len(pixels), *value.shape[1:])


def _side(processor: Any, config: Any) -> int:
    """Return the side of the square that a model is made for."""
    if processor is None:  # on paper
        return sizes_of(config, "image_size")[0]
    if hasattr(processor, "max_num_patches"):
        return isqrt(processor.max_num_patches) * int(processor.patch_size)
    size = (processor.crop_size if getattr(processor, "do_center_crop", False) else None) or processor.size
    return int(next(size[key] for key in ("height", "shortest_edge", "longest_edge") if size[key]))


def _check_divides(size: int, native: int, config: Any) -> None:
    patch = (sizes_of(config, "patch_size") or (1,))[0]
    if size != native and size % patch:
        below = size // patch * patch
        near = " or ".join(str(side) for side in (below, below + patch) if side)
        raise MLLMError(
            f"encoder.resolution is {size}, and the encoder's patches are {patch} pixels wide: take a multiple, {near}."
        )


def _patches(config: Any, side: int) -> int:
    height, width = sizes_of(config, "patch_size")
    return (side // height) * (side // width)


def _grid(config: Any, length: int, side: int) -> tuple[tuple[int, int] | None, int]:
    """Return the grid of a token sequence and how many leading tokens are no patches."""
    if sizes_of(config, "patch_size") and (patches := _patches(config, side)) <= length:
        height, width = sizes_of(config, "patch_size")
        return (side // height, side // width), length - patches
    root = isqrt(length)  # of all tokens, or of all behind one
    return ((root, root), length - root**2) if length - root**2 in (0, 1) else (None, 0)
