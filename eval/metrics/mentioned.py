"""Score which of the objects in an image a caption names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean

from mllm.eval.metrics.checks import check

from mllm.evaluation import Score

VERSION = "1"


def mentioned(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return the recall of an item's references in its prediction, as whole words in lower case."""
    check(predictions, references)
    per_item = [
        fmean(_holds(prediction, name) for name in names)
        for prediction, names in zip(predictions, references, strict=True)
    ]
    return Score(fmean(per_item), per_item, "caption/mentioned", VERSION)


def _holds(text: str, name: str) -> float:
    return float(re.search(rf"(?<!\w){re.escape(name.lower())}(?!\w)", text.lower()) is not None)
