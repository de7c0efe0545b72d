"""A small image decoder in closed form: pictures out of the vectors of what is said of them, without a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.fit import NormalEquations

ITERATIONS = 2  # of the components' randomised search


@torch.no_grad()
def fit_pictures(
    model: Any,
    items: Sequence[Item],
    *,
    strength: float,
    chunk: int = 256,
    readable: Callable[[Sequence[Item]], Sequence[Item]] = lambda items: items,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> float:
    """Set the head ``pixels``: its components to the pictures' main ones, its map from captions to those.

    Every caption of a picture is a row of the regression.

    Args:
        model: the assembly; its language model has vectors of sentences.
        items: pictures with captions.
        strength: of the ridge; see `mllm.fit.NormalEquations.solve`.
        chunk: pictures at once.
        readable: is given items, and returns those that can be read.
        track: wraps the chunks, to show progress.

    Returns:
        The share of the components' variance that the fit explains on these items.

    Raises:
        MLLMError: there are no captions, or fewer pictures than two.
    """
    head = model.heads["pixels"]
    captioned = readable([item for item in items if item.question is None and item.images and item.answers])
    if len(captioned) < 2:
        raise MLLMError("stages.fit of heads.pixels needs at least two pictures with captions.")
    pictures = torch.stack([_pixels(item, head.side) for item in captioned]).float() / 255  # (N, 3 S S)
    mean = pictures.mean(0)
    rank = min(head.project.out_features, len(captioned) - 1)
    _, _, components = torch.svd_lowrank(pictures - mean, q=rank, niter=ITERATIONS)  # (3 S S, rank)
    places = (pictures - mean) @ components
    sums = NormalEquations(head.project.in_features, rank)
    known = _vectors(model.lm, captioned)
    for start in track(range(0, len(captioned), chunk)):
        numbers = range(start, min(start + chunk, len(captioned)))
        rows = [(number, text) for number in numbers for text in captioned[number].answers]
        vectors = torch.stack([known[text] for _, text in rows])
        sums.add(head.body(vectors, torch.randn_like(vectors)).cpu(), places[[number for number, _ in rows]])
    weights, intercept = sums.solve("ridge", strength)
    for parameter in head.parameters():
        parameter.zero_()  # components that there are no pictures for stay so
    head.project.weight[:rank].copy_(weights.T)
    head.project.bias[:rank].copy_(intercept)
    head.components.weight[:, :rank].copy_(components)
    head.components.bias.copy_(mean)
    return sums.explained(weights)


def _vectors(lm: Any, items: Sequence[Item]) -> dict[str, Tensor]:
    """Return the vector ``(D,)`` of each caption, computed once."""
    texts = list(dict.fromkeys(text for item in items for text in item.answers))
    return dict(zip(texts, lm.sentences(texts).float(), strict=True))


def _pixels(item: Item, side: int) -> Tensor:
    """Return an item's picture ``(3 S S,)`` of uint8."""
    small = item.images[0].open().convert("RGB").resize((side, side))
    return torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1).flatten()
