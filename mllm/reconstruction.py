"""Learning a small image decoder: pictures out of the vectors of what is said of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mllm.images import source_of
from mllm.objectives import Inputs
from mllm.pairs import captions_of
from mllm.prompt import Batch, Piece, images_of


class Reconstruction:
    """The mean absolute difference of made pictures from the true ones, and of their edges.

    Args:
        edges: weight of the differences of neighbouring pixels, which keep outlines sharp.
    """

    needs = ("lm.sentences", "heads.pixels")

    def __init__(self, *, edges: float = 1.0) -> None:
        self.edges = edges
        self._vectors: dict[str, Tensor] = {}
        self._pixels: dict[str, Tensor] = {}

    def count(self, rows: Sequence[Sequence[Piece]], batch: Batch | None) -> int:
        """Return the number of pairs."""
        return len(rows)

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over pairs."""
        model = inputs.model
        head = model.heads["pixels"]
        vectors = self._said(model.lm, captions_of(inputs.rows))
        made = head(vectors.to(model.device))  # (N, 3, S, S)
        true = torch.stack([self._true(images_of(row)[0], head.side) for row in inputs.rows]).to(made) / 255
        loss = (made - true).abs().mean((1, 2, 3))
        for axis in (2, 3):
            loss = loss + self.edges * (made.diff(dim=axis) - true.diff(dim=axis)).abs().mean((1, 2, 3))
        return loss.sum()

    @torch.no_grad()
    def _said(self, lm: object, captions: list[str]) -> Tensor:
        """Return vectors ``(N, D)`` of captions, each computed once."""
        new = [text for text in dict.fromkeys(captions) if text not in self._vectors]
        if new:
            self._vectors |= zip(new, lm.sentences(new).float(), strict=True)  # type: ignore[attr-defined]
        return torch.stack([self._vectors[text] for text in captions])

    def _true(self, image: object, side: int) -> Tensor:
        """Return a picture's pixels ``(3, S, S)`` of uint8, read once."""
        source = source_of(image)
        if (key := source.key()) not in self._pixels:
            small = source.open().convert("RGB").resize((side, side))
            self._pixels[key] = torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1).contiguous()
        return self._pixels[key]
