"""Make the baselines of prompted models: no image, another item's image, a mean image, an untrained connector.

A score says little without them: a language model alone answers many questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np
from mllm.eval.scoring import MODEL
from PIL import Image

from mllm.assembly import Assembly
from mllm.build import build_connector
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.media.images import source_of
from mllm.training.calibration import calibrate

USUAL = ("blind", "shuffled")  # evaluated by default
OTHER_IMAGES = ("shuffled", "mean-image")  # which give an item other images than its own
_MEAN_OF, _SIDE = 256, 224  # images, and pixels


@dataclass(frozen=True)
class Condition:
    """Which model answers, and the items as it gets them."""

    model: Assembly
    items: Sequence[Item]


def offered() -> dict[str, bool]:
    """Return the baselines' names, and which of them are evaluated by default."""
    return {name: name in USUAL for name in _BASELINES}


def conditions(model: Assembly, items: Sequence[Item], names: Sequence[str]) -> dict[str, Condition]:
    """Return the condition of the model, called ``model``, and those of the named baselines.

    Raises:
        MLLMError: the items have too few images for a baseline.
    """
    return {MODEL: Condition(model, items), **{name: _BASELINES[name](model, items) for name in names}}


def _blind(model: Assembly, items: Sequence[Item]) -> Condition:
    """Return the model without images, of examples too."""
    return Condition(model, [replace(_imageless(item), shots=tuple(map(_imageless, item.shots))) for item in items])


def _imageless(item: Item) -> Item:
    return replace(item, images=())


def _shuffled(model: Assembly, items: Sequence[Item]) -> Condition:
    partner = derangement(items)
    return Condition(
        model, [replace(item, images=items[other].images) for item, other in zip(items, partner, strict=True)]
    )


def _mean_image(model: Assembly, items: Sequence[Item]) -> Condition:
    mean = source_of(mean_image(items))
    return Condition(model, [replace(item, images=(mean,) * len(item.images)) for item in items])


def _random_connector(model: Assembly, items: Sequence[Item]) -> Condition:
    return Condition(untrained(model, items), items)


_BASELINES: dict[str, Callable[[Assembly, Sequence[Item]], Condition]] = {
    "blind": _blind,
    "shuffled": _shuffled,
    "mean-image": _mean_image,
    "random-connector": _random_connector,
}


def derangement(items: Sequence[Item]) -> list[int]:
    """Give each item another item, with other images, in an order fixed by a seed."""
    order = list(range(len(items)))
    Random(0).shuffle(order)
    partner = [0] * len(items)
    for position, index in enumerate(order):
        others = (order[(position + step) % len(order)] for step in range(1, len(order)))
        partner[index] = next((other for other in others if items[other].images != items[index].images), index)
    if len(items) > 1 and partner == list(range(len(items))):
        raise MLLMError("The baseline 'shuffled' needs items with different images.")
    return partner


def mean_image(items: Sequence[Item]) -> Image.Image:
    """Return the mean of the first 256 distinct images, each resized to 224 x 224 pixels."""
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
    connector = build_connector(spec, encoder=model.encoder, lm=model.lm).to(model.device)
    if model.spec.connector.vocabulary is not None:  # the same words
        connector.get_submodule("vocabulary").load_state_dict(model.connector.vocabulary.state_dict())
    other = Assembly(
        encoder=model.encoder,
        connector=connector,
        lm=model.lm,
        adapters=list(model.adapters),
        spec=model.spec,
        guides=model.guides.unopened(),
    )
    images = [image for item in items for image in item.images][:16]
    if images:
        calibrate(other, model.features(images))
    return other.eval()
