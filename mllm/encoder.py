"""Pixels to features ``(B, P, D_vis)``: any vision model that `transformers` loads, frozen.

Notable: what is a grid and what is not is counted, not known by name. A model returns a sequence, whose first
``P - h*w`` tokens (CLS, registers) are no patches, or a map ``(B, D, h, w)``, all of which are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, PretrainedConfig

from mllm import hub
from mllm.errors import MLLMError


class Encoder(nn.Module):
    """A frozen vision model of `transformers`.

    Args:
        model: an installed part (``mllm/mobilenet-v2``), a hub id or a folder.
        layer: index into the hidden states; None: the model's own output.
        select: ``patches`` (no CLS or register tokens), ``pooled`` (one vector), ``all`` (every token).
        resolution: side of the square input in pixels; None: the image processor's.
        init: ``random`` keeps the architecture and draws new weights (a control).
        seed: of the random weights.

    Attributes:
        dim: D_vis.
        grid: (rows, columns) of the patches, or None where the features are no grid.
        num_patches: P.
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
        self.model = _tower(hub.load_model(AutoModel, folder, init=init, seed=seed))
        self.model.requires_grad_(False).eval()
        self.processor = hub.load_processor(AutoImageProcessor, folder)
        self.size = resolution or _side(self.processor, self.model.config)
        self._folder, self._init = folder, init
        blank = torch.zeros(1, 3, self.size, self.size)  # on paper
        if self.processor is not None:
            blank = self.preprocess([Image.new("RGB", (self.size, self.size))])
        with torch.no_grad():
            features, self.grid = self._features(blank)
        self.num_patches, self.dim = features.shape[1], features.shape[2]

    @property
    def fingerprint(self) -> str:
        """Return what tells these weights from others."""
        return hub.fingerprint(self._folder) if self._init == "pretrained" else hub.tensor_hash(self.model)

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """Return pixels ``(B, 3, H, W)`` of RGB images, as the model's own image processor makes them."""
        size = {"height": self.size, "width": self.size}
        return self.processor(images=list(images), size=size, return_tensors="pt", **self._no_crop())["pixel_values"]

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features ``(B, P, D_vis)`` of pixels ``(B, 3, H, W)``."""
        return self._features(pixels)[0]

    def settings(self) -> dict[str, Any]:
        """Return what, beside the weights, decides the features: part of a cache's key."""
        return {"layer": self.layer, "select": self.select, "size": self.size, "processor": self.processor.to_dict()}

    def _no_crop(self) -> dict[str, Any]:
        """The whole picture is seen: it is resized to the square, not cropped."""
        return {"do_center_crop": False} if hasattr(self.processor, "do_center_crop") else {}

    def _features(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int] | None]:
        output = self.model(pixels.to(self.model.device, self.model.dtype), output_hidden_states=self.layer is not None)
        if self.select == "pooled" and self.layer is None and getattr(output, "pooler_output", None) is not None:
            return rearrange(output.pooler_output.flatten(1), "b d -> b 1 d"), None
        hidden = output.last_hidden_state if self.layer is None else self._hidden(output.hidden_states)
        if hidden.ndim == 4:  # a map (B, D_vis, h, w)
            grid: tuple[int, int] | None = (hidden.shape[2], hidden.shape[3])
            tokens, extra = rearrange(hidden, "b d h w -> b (h w) d"), 0
        else:
            grid, extra = _grid(self.model.config, hidden.shape[1], pixels.shape[-1])
            tokens = hidden
        if self.select == "pooled":
            return tokens[:, extra:].mean(1, keepdim=True), None  # (B, 1, D_vis)
        if self.select == "patches":
            return tokens[:, extra:], grid  # (B, P, D_vis)
        return tokens, grid if extra == 0 else None

    def _hidden(self, states: Sequence[Tensor] | None) -> Tensor:
        if not states:
            raise MLLMError("This encoder returns no hidden states: leave out encoder.layer.")
        assert self.layer is not None
        if not -len(states) <= self.layer < len(states):
            raise MLLMError(
                f"encoder.layer is {self.layer}, but the encoder has {len(states)} hidden states: "
                f"give a number from {-len(states)} to {len(states) - 1}."
            )
        return states[self.layer]


def _tower(model: Any) -> Any:
    """Return the vision tower of a two-tower model, or the model itself."""
    return model.get_encoder(modality="image")


def _side(processor: Any, config: PretrainedConfig) -> int:
    if processor is None:  # on paper
        return int(config.image_size)
    size = getattr(processor, "crop_size", None) or processor.size
    sides = [size[key] for key in ("height", "width", "shortest_edge", "longest_edge") if key in size]
    return int(sides[0])


def _grid(config: PretrainedConfig, length: int, side: int) -> tuple[tuple[int, int] | None, int]:
    """Return the grid of a token sequence and how many leading tokens are no patches."""
    patch = getattr(config, "patch_size", None)
    if isinstance(patch, int) and (side // patch) ** 2 <= length:
        return (side // patch, side // patch), length - (side // patch) ** 2
    root = int(length**0.5)
    return ((root, root), 0) if root * root == length else (None, 0)
