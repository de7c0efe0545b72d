"""Score images matched with captions (Winoground): a prediction lists the passed tests, separated by spaces.

Thrush et al. 2022, https://arxiv.org/abs/2204.03162. ``text``: each image prefers its own caption; ``image``: each
caption its own image; ``group``: both.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import fmean

from mllm.eval.metrics.checks import check

from mllm.evaluation import Score

VERSION = "1"


def _passed(test: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return the share of items that pass a test."""
    check(predictions, references)
    per_item = [float(test in prediction.split()) for prediction in predictions]
    return Score(fmean(per_item), per_item, f"match/{test}", VERSION)


text, image, group = partial(_passed, "text"), partial(_passed, "image"), partial(_passed, "group")
