"""Score captions by a dual encoder such as CLIP: how close a caption is to its picture, and to the references.

Hessel et al. 2021, https://arxiv.org/abs/2104.08718. Values depend on the encoder: the paper's are of CLIP ViT-B/32.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
from mllm.eval.metrics.checks import check

from mllm.errors import MLLMError
from mllm.evaluation import Score

VERSION = "1"

_PREFIX = "A photo depicts "  # before every text, as in the paper
_WEIGHT = 2.5


def clipscore(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, images: Sequence[Sequence[Any]], scorer: Any
) -> Score:
    """Return 2.5 times the cosine of caption and picture (0 where it is negative); references are not looked at."""
    check(predictions, references)
    per_item = _to_picture(predictions, images, scorer).tolist()
    return Score(fmean(per_item), per_item, "caption/clipscore", VERSION)


def refclipscore(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, images: Sequence[Sequence[Any]], scorer: Any
) -> Score:
    """Return the harmonic mean of CLIPScore and the largest cosine of the caption with a reference."""
    check(predictions, references)
    picture = _to_picture(predictions, images, scorer)
    said = scorer.embed_texts([_PREFIX + text for text in predictions])
    texts = list(dict.fromkeys(text for answers in references for text in answers))
    known = dict(zip(texts, scorer.embed_texts([_PREFIX + text for text in texts]), strict=True))
    closest = np.array(
        [
            max(0.0, *(float(own @ known[text]) for text in answers))
            for own, answers in zip(said, references, strict=True)
        ]
    )
    total = picture + closest
    per_item = np.divide(2 * picture * closest, total, out=np.zeros(len(total)), where=total > 0).tolist()
    return Score(fmean(per_item), per_item, "caption/refclipscore", VERSION)


def _to_picture(predictions: Sequence[str], images: Sequence[Sequence[Any]], scorer: Any) -> np.ndarray:
    """Return 2.5 max(cosine, 0) of each caption and its only picture, (N,)."""
    for item, own in enumerate(images):
        if len(own) != 1:
            raise MLLMError(f"CLIPScore: item {item} has {len(own)} pictures; expected one.")
    distinct = list(dict.fromkeys(own[0] for own in images))
    known = dict(zip(distinct, scorer.embed_images(distinct), strict=True))
    said = scorer.embed_texts([_PREFIX + text for text in predictions])
    cosines = [float(text @ known[own[0]]) for text, own in zip(said, images, strict=True)]
    return _WEIGHT * np.maximum(cosines, 0.0)
