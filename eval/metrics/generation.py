"""Score generated pictures: a prediction is a picture's path, an item's last image the one it is held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from statistics import fmean
from typing import Any

import numpy as np
import torch
from mllm.eval.metrics.checks import check

from mllm.errors import MLLMError
from mllm.evaluation import Score
from mllm.media.images import open_image

VERSION = "1"

_SIDE = {"fid": 299, "lpips": 256}  # pixels that pictures are stretched to


def clip_similarity(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, images: Sequence[Sequence[Any]], scorer: Any
) -> Score:
    """Return the mean cosine of each picture and the real one, in the scorer's space."""
    real = _real(predictions, references, images)
    cosines = (scorer.embed_images(list(predictions)) * scorer.embed_images(real)).sum(-1)
    return Score(float(cosines.mean()), cosines.tolist(), "generation/clip-similarity", VERSION)


def fid(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    images: Sequence[Sequence[Any]],
    feature: Any = 2048,
) -> Score:
    """Return the Fréchet distance of Inception features, by torchmetrics (Heusel et al. 2017, arXiv:1706.08500).

    It has no value for an item. Of few pictures it is biased upwards: papers use some 30,000.

    Args:
        feature: another module ``(N, 3, 299, 299)`` of uint8 to ``(N, D)``, in Inception's place.

    Raises:
        MLLMError: torchmetrics is not installed, or its weights cannot be downloaded.
    """
    real = _real(predictions, references, images)
    metric = _torchmetrics(lambda: import_module("torchmetrics.image.fid").FrechetInceptionDistance(feature=feature))
    for batch, kind in ((real, True), (predictions, False)):
        for image in batch:
            metric.update(_pixels(image, "fid"), real=kind)
    return Score(float(metric.compute()), [], "generation/fid", VERSION, better="lower")


def lpips(predictions: Sequence[str], references: Sequence[Sequence[str]], *, images: Sequence[Sequence[Any]]) -> Score:
    """Return the mean perceptual distance at 256 x 256 pixels, AlexNet's, by torchmetrics (arXiv:1801.03924).

    Raises:
        MLLMError: torchmetrics is not installed, or its weights cannot be downloaded.
    """
    real = _real(predictions, references, images)
    module = "torchmetrics.image.lpip"
    metric = _torchmetrics(lambda: import_module(module).LearnedPerceptualImagePatchSimilarity(normalize=True))
    with torch.no_grad():
        per_item = [
            float(metric(_pixels(made, "lpips") / 255, _pixels(true, "lpips") / 255))
            for made, true in zip(predictions, real, strict=True)
        ]
    return Score(fmean(per_item), per_item, "generation/lpips", VERSION, better="lower")


def _real(
    predictions: Sequence[str], references: Sequence[Sequence[str]], images: Sequence[Sequence[Any]]
) -> list[Any]:
    check(predictions, references)
    for item, own in enumerate(images):
        if not own:
            raise MLLMError(f"Item {item} has no picture that a generated one could be held against.")
    return [own[-1] for own in images]


def _pixels(image: Any, metric: str) -> torch.Tensor:
    """Return ``(1, 3, S, S)`` of uint8."""
    picture = open_image(image).resize((_SIDE[metric], _SIDE[metric]))
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None]


def _torchmetrics(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except ImportError as error:  # also torchmetrics' own, which names torch-fidelity or torchvision
        raise MLLMError(f"This metric needs more: pip install 'mllm-assembly[generation]' ({error}).") from None
    except OSError as error:
        raise MLLMError(f"This metric's weights are downloaded once, and that failed: {error}.") from None
