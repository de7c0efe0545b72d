"""Score generated images: a prediction is an image's path, and an item's last image is the real one."""

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
from mllm.media.images import ImageSource, open_image
from mllm.slots import Scorer

VERSION = "1"

_SIDE = {"fid": 299, "lpips": 256}  # pixels that images are resized to


def clip_similarity(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    images: Sequence[Sequence[ImageSource]],
    scorer: Scorer,
) -> Score:
    """Return the mean cosine similarity of each image and the real one, in the scorer's space."""
    real = _real(predictions, references, images)
    cosines = (scorer.embed_images(list(predictions)) * scorer.embed_images(real)).sum(-1)
    return Score(float(cosines.mean()), cosines.tolist(), "generation/clip-similarity", VERSION)


def fid(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    images: Sequence[Sequence[ImageSource]],
    feature: int | torch.nn.Module = 2048,
) -> Score:
    """Return the Fréchet distance of Inception features, by torchmetrics (Heusel et al. 2017, arXiv:1706.08500).

    It has no values for items. For few images it is biased upwards: papers use some 30,000.

    Args:
        feature: the size of Inception's features, or another module, ``(N, 3, 299, 299)`` of uint8 to ``(N, D)``.

    Raises:
        MLLMError: torchmetrics is not installed, or its weights cannot be downloaded.
    """
    real = _real(predictions, references, images)
    metric = _torchmetrics(lambda: import_module("torchmetrics.image.fid").FrechetInceptionDistance(feature=feature))
    for batch, kind in ((real, True), (predictions, False)):
        for image in batch:
            metric.update(_pixels(image, "fid"), real=kind)
    return Score(float(metric.compute()), [], "generation/fid", VERSION, better="lower")


def lpips(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, images: Sequence[Sequence[ImageSource]]
) -> Score:
    """Return the mean LPIPS distance by AlexNet at 256 x 256 pixels, by torchmetrics (arXiv:1801.03924).

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
    predictions: Sequence[str], references: Sequence[Sequence[str]], images: Sequence[Sequence[ImageSource]]
) -> list[ImageSource]:
    check(predictions, references)
    for item, sources in enumerate(images):
        if not sources:
            raise MLLMError(f"Item {item} has no image that a generated one could be compared with.")
    return [sources[-1] for sources in images]


def _pixels(image: str | ImageSource, metric: str) -> torch.Tensor:
    """Return ``(1, 3, S, S)`` of uint8."""
    resized = open_image(image).resize((_SIDE[metric], _SIDE[metric]))
    return torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1)[None]


def _torchmetrics(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except ImportError as error:  # also torchmetrics' own, which names torch-fidelity or torchvision
        raise MLLMError(f"This metric needs more: pip install 'mllm-assembly[generation]' ({error}).") from None
    except OSError as error:
        raise MLLMError(f"This metric's weights are downloaded once, and that failed: {error}.") from None
