"""Score captions by a dual encoder such as CLIP: their similarity to the image, and to the references.

Hessel et al. 2021, https://arxiv.org/abs/2104.08718. Values depend on the encoder: the paper used CLIP ViT-B/32.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np
from mllm.eval.metrics.checks import check

from mllm.errors import MLLMError
from mllm.evaluation import Score
from mllm.media.images import ImageSource
from mllm.slots import Scorer

VERSION = "1"

_PREFIX = "A photo depicts "  # before every text, as in the paper
_WEIGHT = 2.5


def clipscore(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    images: Sequence[Sequence[ImageSource]],
    scorer: Scorer,
) -> Score:
    """Return CLIPScore, 2.5 max(cosine, 0) of caption and image; references are not used."""
    check(predictions, references)
    per_item = _to_image(predictions, images, scorer).tolist()
    return Score(fmean(per_item), per_item, "caption/clipscore", VERSION)


def refclipscore(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    images: Sequence[Sequence[ImageSource]],
    scorer: Scorer,
) -> Score:
    """Return RefCLIPScore, the harmonic mean of CLIPScore and the caption's largest cosine with a reference."""
    check(predictions, references)
    to_image = _to_image(predictions, images, scorer)
    captions = scorer.embed_texts([_PREFIX + text for text in predictions])
    texts = list(dict.fromkeys(text for answers in references for text in answers))
    vectors = dict(zip(texts, scorer.embed_texts([_PREFIX + text for text in texts]), strict=True))
    to_references = np.array(
        [
            max(0.0, *(float(caption @ vectors[text]) for text in answers))
            for caption, answers in zip(captions, references, strict=True)
        ]
    )
    total = to_image + to_references
    per_item = np.divide(2 * to_image * to_references, total, out=np.zeros(len(total)), where=total > 0).tolist()
    return Score(fmean(per_item), per_item, "caption/refclipscore", VERSION)


def _to_image(predictions: Sequence[str], images: Sequence[Sequence[ImageSource]], scorer: Scorer) -> np.ndarray:
    """Return 2.5 max(cosine, 0) ``(N,)`` of each caption and its only image."""
    for item, sources in enumerate(images):
        if len(sources) != 1:
            raise MLLMError(f"CLIPScore: item {item} has {len(sources)} images; expected one.")
    distinct = list(dict.fromkeys(image for (image,) in images))
    vectors = dict(zip(distinct, scorer.embed_images(distinct), strict=True))
    captions = scorer.embed_texts([_PREFIX + text for text in predictions])
    cosines = [float(caption @ vectors[image]) for caption, (image,) in zip(captions, images, strict=True)]
    return _WEIGHT * np.maximum(cosines, 0.0)
