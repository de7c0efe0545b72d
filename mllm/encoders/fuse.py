"""Combine several encoders into one by concatenating their features along the width or the sequence."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mllm.errors import MLLMError
from mllm.hub.identity import joined, weights_of
from mllm.media.images import ImageSource
from mllm.slots import Encoder


class Opened(tuple[Any, ...]):
    """One image as each of the encoders opened it."""


class Fuse(Encoder):
    """The concatenated features of several encoders; each has its own layer, selection and resolution.

    Args:
        of: the encoders.
        fuse: ``width``: ``(B, P, D_1 + D_2)``, needs equal numbers of patches; ``sequence``: ``(B, P_1 + P_2, D)``,
            needs equal widths.

    Raises:
        MLLMError: the numbers of patches, or the widths, differ.
    """

    of: Any  # encoders, or `Shape`s

    def __init__(self, *, of: Sequence[nn.Module], fuse: Literal["width", "sequence"]) -> None:
        super().__init__()
        self.of, self.fuse = nn.ModuleList(of), fuse
        patches, widths = [member.num_patches for member in self.of], [member.dim for member in self.of]
        if fuse == "width" and len(set(patches)) > 1:
            raise MLLMError(
                f"encoder.fuse is width, and the encoders give {_enumerated(patches)} features: equal numbers are "
                "needed. Set the resolution of one of them so that the numbers of patches match, or fuse=sequence."
            )
        if fuse == "sequence" and len(set(widths)) > 1:
            raise MLLMError(
                f"encoder.fuse is sequence, and the encoders' features are {_enumerated(widths)} wide: equal widths "
                "are needed. Choose encoders of equal width, or fuse=width."
            )
        grids = {member.grid for member in self.of}
        self.dim, self.num_patches = (sum(widths), patches[0]) if fuse == "width" else (widths[0], sum(patches))
        self.grid = grids.pop() if fuse == "width" and len(grids) == 1 else None
        self.cacheable = any(member.cacheable for member in self.of)
        self.reads_images = all(member.reads_images for member in self.of)

    @property
    def fingerprint(self) -> str:
        """Return the joint fingerprint of the encoders."""
        fingerprints = [str(member.fingerprint) for member in self.of]
        weights = "".join(weights_of(fingerprint) for fingerprint in fingerprints)
        return joined(hashlib.sha256(weights.encode()).hexdigest(), fingerprints)

    def settings(self) -> dict[str, Any]:
        """Return the settings that, with the weights, determine the features: the encoders' and the fusion."""
        return {"fuse": self.fuse, "of": [[type(member).__name__, member.settings()] for member in self.of]}

    def open(self, piece: Any) -> Opened:
        """Return an image as each encoder opens it."""
        return piece if isinstance(piece, Opened) else Opened(member.open(piece) for member in self.of)

    def key(self, source: ImageSource) -> str:
        """Return the encoders' distinct keys of an image, joined."""
        return "+".join(dict.fromkeys(member.key(source) for member in self.of))

    def preprocess(self, items: Sequence[Opened]) -> Tensor:
        """Return the encoders' inputs, flattened and concatenated ``(B, N)``."""
        columns = zip(*items, strict=True)
        inputs = [member.preprocess(list(column)) for member, column in zip(self.of, columns, strict=True)]
        return torch.cat([rows.flatten(1).float() for rows in inputs], dim=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features ``(B, P, D_vis)`` of the output of `preprocess`."""
        parts = pixels.split([torch.Size(member.shape).numel() for member in self.of], dim=1)
        features = [member(part.unflatten(1, member.shape)) for member, part in zip(self.of, parts, strict=True)]
        return torch.cat(features, dim=2 if self.fuse == "width" else 1)


def _enumerated(numbers: Sequence[int]) -> str:
    return " and ".join(str(number) for number in numbers)
