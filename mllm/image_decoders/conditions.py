"""What image decoders have in common, and whether a head makes what one takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mllm.errors import MLLMError
from mllm.registry import lookup, made
from mllm.spec import AssemblySpec


class ImageDecoder(Protocol):
    """A frozen model that makes images; its class says by ``shape(**options)`` what it takes, and loads nothing.

    One that was trained to take noise off may offer ``denoise(images, conditions)``, its own loss ``(N,)``.
    """

    condition: tuple[int, int]  # L, W

    @property
    def label(self) -> str:
        """Return what it is called in an answer."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return its own text encoder's conditions ``(N, L, W)``."""

    def draw(self, conditions: Tensor, seeds: Sequence[int]) -> list[Any]:
        """Return a PIL image for each of the conditions ``(N, L, W)``, drawn with its seed."""


def check_condition(spec: AssemblySpec) -> None:
    """Hold the head that makes conditions against the image decoder, by their shapes; nothing is loaded.

    Raises:
        MLLMError: the shapes differ, or the decoder is not there.
    """
    if spec.decoder is None:
        return
    label = f"image decoder {spec.decoder.type}"
    wanted = made(lookup("image_decoders", spec.decoder.type).shape, label, **spec.decoder.options())
    for part in spec.heads:
        with torch.device("meta"):
            head = made(lookup("heads", part.type), f"head {part.type}", lm_dim=8, vis_dim=8, **part.options())
        found = getattr(head, "condition", wanted)
        if found != wanted:
            raise MLLMError(
                f"The head {part.type} makes conditions of {found[0]} x {found[1]}, and the image decoder takes "
                f"{wanted[0]} x {wanted[1]}. Set the head's length and width to that, or take another decoder."
            )
