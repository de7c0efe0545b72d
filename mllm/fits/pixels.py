"""Fit the head `pixels` in closed form: a small image decoder, from the vectors of captions to images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from mllm.capabilities import SentenceModel
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.fits.base import Material, Ridge
from mllm.model import Model
from mllm.registry import Count, NonNegative

ITERATIONS = 2  # power iterations of the randomized SVD


class PixelsFit(Ridge):
    """Principal components of the images, and a ridge regression from captions to the images' coordinates.

    Every caption of an image is a row of the regression. With fewer images than components, the rest are 0.
    """

    needs = (SentenceModel,)

    def __init__(self, *, part: str, strength: NonNegative = 0.01, chunk: Count = 256) -> None:
        super().__init__(part=part, strength=strength, chunk=chunk)

    def rows(self, model: Model, data: Material) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the Fourier features of captions' vectors, and their images' coordinates in the components."""
        head = self.part(model)
        items = data.readable([item for item in data.captioned if item.images])
        coordinates = _fit_components(head, items)
        vectors_of = _vectors(model.lm, items)
        for start in data.track(range(0, len(items), self.chunk)):
            indices = range(start, min(start + self.chunk, len(items)))
            captions = [(index, text) for index in indices for text in items[index].answers]
            vectors = torch.stack([vectors_of[text] for _, text in captions])
            yield head.body(vectors, torch.randn_like(vectors)), coordinates[[index for index, _ in captions]]


def _fit_components(head: Any, items: Sequence[Item]) -> Tensor:
    """Set the head's principal components, and return the images' coordinates ``(N, rank)``."""
    if len(items) < 2:
        raise MLLMError(
            f"stages.fit of heads.pixels got {len(items)} images with captions: expected at least two. Add more data."
        )
    images = torch.stack([_pixels(item, head.side) for item in items]).float() / 255  # (N, 3 S S)
    mean, rank = images.mean(0), head.project.out_features
    _, _, principal = torch.svd_lowrank(images - mean, q=min(rank, len(items) - 1), niter=ITERATIONS)
    components = pad(principal, (0, rank - principal.shape[1]))  # (3 S S, rank)
    head.components.weight.copy_(components)
    head.components.bias.copy_(mean)
    return (images - mean) @ components


def _vectors(lm: SentenceModel, items: Sequence[Item]) -> dict[str, Tensor]:
    """Return the vector ``(D,)`` of each caption, computed once."""
    texts = list(dict.fromkeys(text for item in items for text in item.answers))
    return dict(zip(texts, lm.sentences(texts).float(), strict=True))


def _pixels(item: Item, side: int) -> Tensor:
    """Return an item's first image as ``(3 S S,)`` of uint8."""
    resized = item.images[0].open().convert("RGB").resize((side, side))
    return torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1).flatten()
