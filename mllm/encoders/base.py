"""What every encoder is: pixels (or frames, or sound) to features ``(B, P, D_vis)``. The kinds are in ``encoders/``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mllm.errors import MLLMError
from mllm.hub.fingerprints import fingerprint, tensor_hash
from mllm.media.images import ImageSource, open_image


class Encoder(nn.Module):
    """A frozen part that features come from.

    Attributes:
        dim: D_vis.
        grid: (rows, columns) of the patches, or None where the features are no grid.
        num_patches: P.
        shape: of one picture as `preprocess` returns it.
        keeps: whether features cost enough to be kept in the cache.
    """

    dim: int
    grid: tuple[int, int] | None
    num_patches: int
    shape: tuple[int, ...]
    keeps = True

    @property
    def fingerprint(self) -> str:
        """Return what tells these weights from others."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Return what, beside the weights, decides the features: part of a cache's key."""
        raise NotImplementedError

    def open(self, piece: Any) -> Any:
        """Return a piece of a prompt as `preprocess` takes it: a picture. What is open already is returned as it is."""
        return open_image(piece)

    def key(self, source: ImageSource) -> str:
        """Return what a source's features are kept under: equal keys, equal features."""
        return source.key()

    def preprocess(self, items: Sequence[Any]) -> Tensor:
        """Return what the forward takes of opened pieces: pixels ``(B, 3, H, W)``, or of another form."""
        raise NotImplementedError

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features ``(B, P, D_vis)``."""
        raise NotImplementedError

    def name_weights(self, folder: str, init: str) -> None:
        """Take the fingerprint: of pretrained weights from their files, of random ones before any is dropped."""
        self._folder = folder
        drawn = init == "random" and not on_paper()
        self._drawn = tensor_hash(self) if drawn else None

    def name_drawn(self) -> None:
        """Take the fingerprint of tensors that are in memory, before any is dropped."""
        self._drawn = None if on_paper() else tensor_hash(self)

    def weights_name(self) -> str:
        """Return the fingerprint that `name_weights` took."""
        return self._drawn or fingerprint(self._folder)


def on_paper() -> bool:
    """Whether parts are built on the meta device, from configurations alone."""
    return torch.get_default_device().type == "meta"


def selected(hidden: Tensor, select: str, grid: tuple[int, int] | None, extra: int) -> Tensor:
    """Return ``(B, P, D_vis)`` of tokens of which the first ``extra`` are no patches.

    Raises:
        MLLMError: patches are wanted of tokens that form no grid: which are patches cannot be told.
    """
    if select == "all":
        return hidden
    if grid is None:
        raise MLLMError(
            f"encoder.select is {select!r}, but the {hidden.shape[1]} tokens of this encoder form no square grid, so "
            "which of them are patches is not known. Set encoder.select=all."
        )
    patches = hidden[:, extra:]
    return patches.mean(1, keepdim=True) if select == "pooled" else patches


def layer_of(states: Sequence[Tensor] | None, layer: int) -> Tensor:
    """Return one of a model's hidden states.

    Raises:
        MLLMError: there are none, or not that many.
    """
    if not states:
        raise MLLMError("This encoder returns no hidden states: leave out encoder.layer.")
    if not -len(states) <= layer < len(states):
        raise MLLMError(
            f"encoder.layer is {layer}, but the encoder has {len(states)} hidden states: "
            f"give a number from {-len(states)} to {len(states) - 1}."
        )
    return states[layer]


def sizes_of(config: Any, name: str) -> tuple[int, ...]:
    """Return a configuration's ``image_size`` or ``patch_size`` as (height, width); empty where it has none."""
    value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    if isinstance(value, int):
        return (value, value)
    return tuple(int(side) for side in value) if isinstance(value, list | tuple) and len(value) == 2 else ()
