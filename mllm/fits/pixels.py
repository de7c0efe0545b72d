"""A small image decoder in closed form: pictures out of the vectors of what is said of them, without a gradient."""

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

ITERATIONS = 2  # of the components' randomised search


class PixelsFit(Ridge):
    """Sets the head's components to the pictures' main ones, and its map from captions to those.

    Every caption of a picture is a row of the regression. Components that there are too few pictures for are 0.
    """

    needs = (SentenceModel,)

    def __init__(self, *, part: str, strength: float = 0.01, chunk: int = 256) -> None:
        super().__init__(part=part, strength=strength, chunk=chunk)

    def rows(self, model: Model, data: Material) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what the map is applied to, of captions' vectors, and their pictures' places among the components."""
        head = self.part(model)
        items = data.readable([item for item in data.captioned if item.images])
        places = _places(head, items)
        known = _vectors(model.lm, items)
        for start in data.track(range(0, len(items), self.chunk)):
            numbers = range(start, min(start + self.chunk, len(items)))
            said = [(number, text) for number in numbers for text in items[number].answers]
            vectors = torch.stack([known[text] for _, text in said])
            yield head.body(vectors, torch.randn_like(vectors)), places[[number for number, _ in said]]


def _places(head: Any, items: Sequence[Item]) -> Tensor:
    """Set the head's components, and return the pictures' places ``(N, features)`` among them."""
    if len(items) < 2:
        raise MLLMError("stages.fit of heads.pixels needs at least two pictures with captions.")
    pictures = torch.stack([_pixels(item, head.side) for item in items]).float() / 255  # (N, 3 S S)
    mean, features = pictures.mean(0), head.project.out_features
    _, _, found = torch.svd_lowrank(pictures - mean, q=min(features, len(items) - 1), niter=ITERATIONS)
    components = pad(found, (0, features - found.shape[1]))  # (3 S S, features)
    head.components.weight.copy_(components)
    head.components.bias.copy_(mean)
    return (pictures - mean) @ components


def _vectors(lm: Any, items: Sequence[Item]) -> dict[str, Tensor]:
    """Return the vector ``(D,)`` of each caption, computed once."""
    texts = list(dict.fromkeys(text for item in items for text in item.answers))
    return dict(zip(texts, lm.sentences(texts).float(), strict=True))


def _pixels(item: Item, side: int) -> Tensor:
    """Return an item's picture ``(3 S S,)`` of uint8."""
    small = item.images[0].open().convert("RGB").resize((side, side))
    return torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1).flatten()
