"""Provide what encoders share: fingerprints, hidden states and the selection of patch tokens."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mllm.errors import MLLMError
from mllm.hub.fingerprints import fingerprint, tensor_hash
from mllm.hub.identity import fingerprint_of
from mllm.slots import Encoder


class PretrainedEncoder(Encoder):
    """An encoder with weights, whose fingerprint is computed from them and from what else determines its outputs."""

    _folder: str
    _hash: str | None
    _aspects: dict[str, Any]

    def set_fingerprint(
        self, folder: str = "", init: str = "random", *, configuration: Any = None, preprocessing: Any = None
    ) -> None:
        """Choose the sources of the fingerprint: the files of pretrained weights, or the current random weights.

        The constructor calls it last.

        Args:
            folder: of the pretrained weights.
            init: ``pretrained`` or ``random``.
            configuration: what the same weights would need to compute the same; anything that JSON can express.
            preprocessing: how images are prepared; likewise.
        """
        self._folder = folder
        self._aspects = {"configuration": configuration, "preprocessing": preprocessing}
        self._hash = tensor_hash(self) if init == "random" and not on_meta() else None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return the fingerprint of weights, configuration and preprocessing; see `mllm.hub.identity`."""
        return fingerprint_of(self._hash or fingerprint(self._folder), **self._aspects)


class Shape(Encoder):
    """An encoder of which only the shape of the features is known: enough to plan with, not to encode images.

    Args:
        dim: D_vis, the width of the features.
        grid: rows and columns of the patches, or None.
        patches: P, the number of features, if there is no grid.
    """

    def __init__(self, *, dim: int, grid: tuple[int, int] | None = None, patches: int | None = None) -> None:
        super().__init__()
        assert grid or patches
        self.dim, self.grid = dim, grid and (grid[0], grid[1])
        self.num_patches = grid[0] * grid[1] if grid else int(patches or 0)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features ``(B, P, D_vis)`` of zeros."""
        return torch.zeros(len(pixels), self.num_patches, self.dim)


def on_meta() -> bool:
    """Return whether parts are built on the meta device, from configurations alone."""
    return torch.get_default_device().type == "meta"


def select_tokens(hidden: Tensor, select: str, grid: tuple[int, int] | None, extra: int) -> Tensor:
    """Return the selected tokens ``(B, P, D_vis)``.

    Args:
        hidden: all tokens ``(B, N, D_vis)``.
        select: ``patches``, ``pooled`` (the mean of the patches) or ``all``.
        grid: rows and columns of the patches; None if the tokens form no grid.
        extra: the number of leading tokens that are not patches (CLS, registers).

    Raises:
        MLLMError: patches are selected, but the tokens form no grid, so it is unknown which tokens are patches.
    """
    if select == "all":
        return hidden
    if grid is None:
        raise MLLMError(
            f"encoder.select is {select!r}, but the {hidden.shape[1]} tokens of this encoder form no square grid, so "
            "it is unknown which of them are patches. Set encoder.select=all."
        )
    patches = hidden[:, extra:]
    return patches.mean(1, keepdim=True) if select == "pooled" else patches


def layer_of(states: Sequence[Tensor] | None, layer: int) -> Tensor:
    """Return one of a model's hidden states.

    Raises:
        MLLMError: there are no hidden states, or not that many.
    """
    if not states:
        raise MLLMError("encoder.layer is set, but this encoder returns no hidden states: leave out encoder.layer.")
    if not -len(states) <= layer < len(states):
        raise MLLMError(
            f"encoder.layer is {layer}, but the encoder has {len(states)} hidden states: "
            f"give a number from {-len(states)} to {len(states) - 1}."
        )
    return states[layer]


def sizes_of(config: Any, name: str) -> tuple[int, ...]:
    """Return a configuration's ``image_size`` or ``patch_size`` as (height, width), or () if it has none."""
    value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    if isinstance(value, int):
        return (value, value)
    return tuple(int(side) for side in value) if isinstance(value, list | tuple) and len(value) == 2 else ()
