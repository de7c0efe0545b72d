"""Judge whether a generated image shows the requested object, by a classifier that is not used in training.

The judge is a ridge classifier on EfficientNet-Lite's features, fitted to emoji scenes of the training split, which are
resized to the size of the images that are judged.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from mllm.eval.metrics.checks import check
from PIL import Image
from torch import Tensor

from mllm.build import build
from mllm.config.parts import AssemblySpec, EncoderSpec
from mllm.data.emoji.scenes import emoji_scenes
from mllm.encoders.feature_store import FeatureStore, open_store
from mllm.errors import MLLMError
from mllm.evaluation import Score
from mllm.fits.regression import NormalEquations
from mllm.media.images import ImageSource, source_of

VERSION = "1"

_SIDE = 64  # pixels
_SCENES, _SEED = 3000, 11
_STRENGTH = 0.01


@dataclass(frozen=True)
class Small:
    """An image at the size that images are judged at."""

    source: ImageSource

    def open(self) -> Image.Image:
        """Return the resized image, RGB."""
        return self.source.open().convert("RGB").resize((_SIDE, _SIDE))

    def key(self) -> str:
        """Return a hash of the image and its size."""
        return f"{self.source.key()} {_SIDE}"


def emoji(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return the accuracy of the judge, which chooses among all known kinds, at finding the requested object.

    Raises:
        MLLMError: a reference that is not the name of a kind of object that the judge knows.
    """
    check(predictions, references)
    store, weights, intercept, names = _judge()
    for answers in references:
        if not {*answers} & {*names}:
            raise MLLMError(f"The judge knows no {answers[0]!r}: expected a caption of emoji-scenes' task 'name'.")
    features = _features(store, [source_of(Path(path)) for path in predictions])
    recognized = [names[index] for index in (features @ weights + intercept).argmax(1).tolist()]
    per_item = [float(name in answers) for name, answers in zip(recognized, references, strict=True)]
    return Score(fmean(per_item), per_item, "generation/emoji", VERSION)


def _features(store: FeatureStore, images: Sequence[ImageSource]) -> Tensor:
    return store([Small(image) for image in images]).cpu().double().mean(1)


@functools.cache
def _judge() -> tuple[FeatureStore, Tensor, Tensor, tuple[str, ...]]:
    """Return the judge: the store of its features, its weights ``(D, K)``, its intercept ``(K,)`` and its K names."""
    items = emoji_scenes(split="train", task="name", size=_SCENES, seed=_SEED, still=True)
    names = items[0].choices
    store = open_store(build(AssemblySpec(encoder=EncoderSpec(model="mllm/efficientnet-lite0"))), "auto")
    features = _features(store, [item.images[0] for item in items])
    right = torch.zeros(len(items), len(names), dtype=torch.float64)
    right[torch.arange(len(items)), [names.index(item.answers[0]) for item in items]] = 1.0
    sums = NormalEquations(features.shape[1], len(names))
    sums.add(features, right)
    weights, intercept = sums.solve("ridge", _STRENGTH)
    store.flush()
    return store, weights, intercept, names
