"""What a model is held against: itself without the image, with another's, with a mean image, or without training.

A score without them says little: a language model alone answers many questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image

from mllm.assembly import Assembly
from mllm.build import build_connector
from mllm.data.items import Item
from mllm.errors import MLLMError, near
from mllm.media.images import ImageSource, source_of
from mllm.training.calibration import calibrate

BASELINES = ("blind", "shuffled", "mean-image", "random-connector")
USUAL = BASELINES[:2]
_MEAN_OF, _SIDE = 256, 224  # images, and pixels


@dataclass(frozen=True)
class Condition:
    """Which model answers, and what an item's images are replaced by."""

    model: Assembly
    images: Callable[[int], tuple[ImageSource, ...]]
    sighted: bool = True  # whether the pictures of the examples before an item are shown


def conditions(model: Assembly, items: Sequence[Item], names: Sequence[str]) -> dict[str, Condition]:
    """Return the model's own condition, called ``model``, and the baselines'.

    Raises:
        MLLMError: no baseline has that name.
    """
    own = Condition(model, lambda index: items[index].images)
    return {"model": own, **{name: _condition(model, items, name) for name in names}}


def _condition(model: Assembly, items: Sequence[Item], name: str) -> Condition:
    if name == "blind":
        return Condition(model, lambda index: (), sighted=False)
    if name == "shuffled":
        partner = derangement(items)
        return Condition(model, lambda index: items[partner[index]].images)
    if name == "mean-image":
        mean = source_of(mean_image(items))
        return Condition(model, lambda index: (mean,) * len(items[index].images))
    if name == "random-connector":
        return Condition(untrained(model, items), lambda index: items[index].images)
    raise MLLMError(f"No baseline is called {name!r}. {near(name, BASELINES)}")


def derangement(items: Sequence[Item]) -> list[int]:
    """Give each item another item, with another image, in an order fixed by a seed."""
    order = list(range(len(items)))
    Random(0).shuffle(order)
    partner = [0] * len(items)
    for place, index in enumerate(order):
        others = (order[(place + step) % len(order)] for step in range(1, len(order)))
        partner[index] = next((other for other in others if items[other].images != items[index].images), index)
    if len(items) > 1 and partner == list(range(len(items))):
        raise MLLMError("The baseline 'shuffled' needs items with different images.")
    return partner


def mean_image(items: Sequence[Item]) -> Image.Image:
    """Return the mean of the first 256 distinct images, each stretched to 224 x 224 pixels."""
    sources = list(dict.fromkeys(image for item in items for image in item.images))[:_MEAN_OF]
    if not sources:
        raise MLLMError("The baseline 'mean-image' needs items with images.")
    total = np.zeros((_SIDE, _SIDE, 3))
    for source in sources:
        total += np.asarray(source.open().resize((_SIDE, _SIDE)))
    return Image.fromarray((total / len(sources)).round().astype(np.uint8))


def untrained(model: Assembly, items: Sequence[Item]) -> Assembly:
    """Return a model with the same frozen parts and adapters, and a new connector scaled to the model's embeddings."""
    spec = model.spec.model_copy(update={"seed": model.spec.seed + 1})
    connector = build_connector(spec, encoder=model.encoder, lm_dim=model.lm.dim).to(model.device)
    other = Assembly(
        encoder=model.encoder,
        connector=connector,
        lm=model.lm,
        adapters=list(model.adapters),
        spec=model.spec,
        open_scorer=model.open_scorer,
    )
    images = [image for item in items for image in item.images][:16]
    if images:
        calibrate(other, model.features(images))
    return other.eval()
