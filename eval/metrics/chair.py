"""Compute CHAIR, the share of objects in a caption that are not in the image (Rohrbach et al. 2018, arXiv:1809.02156).

An item's references are the objects in its image. The vocabulary is all references of all items; a caption names an
object if it has its name, or the plural, as whole words. An object's synonyms follow its name, separated by "|":
``"couch|sofa"``. The figures in the paper are for COCO's 80 classes with the authors' list of synonyms.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from mllm.eval.metrics.checks import check

from mllm.evaluation import Score

VERSION = "1"


def per_object(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return CHAIRi, the share of the named objects that are not in the image. An item's value is its own share.

    An object that a caption names twice counts once.
    """
    named, wrong = _counts(predictions, references)

    def alone(chosen: Sequence[int]) -> float:
        return float(wrong[chosen].sum() / max(1, named[chosen].sum()))

    per_item = (wrong / np.maximum(named, 1)).tolist()
    return Score(alone(range(len(named))), per_item, "caption/chair-i", VERSION, better="lower", alone=alone)


def per_caption(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return CHAIRs, the share of captions that name an object which is not in the image."""
    _, wrong = _counts(predictions, references)
    per_item = (wrong > 0).astype(float)
    return Score(float(per_item.mean()), per_item.tolist(), "caption/chair-s", VERSION, better="lower")


def _counts(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Return how many objects each caption names, and how many of these are not in the image: ``(N,)`` each."""
    check(predictions, references)
    objects = {reference for answers in references for reference in answers}
    objects_by_name = {name.strip().lower(): one for one in sorted(objects) for name in one.split("|") if name.strip()}
    # Of two names that start at the same character the longer one counts: a "hot dog" is not a dog.
    either = "|".join(re.escape(name) for name in sorted(objects_by_name, key=len, reverse=True))
    pattern = re.compile(rf"(?<!\w)({either})(?:s|es)?(?!\w)")
    named, wrong = [], []
    for prediction, answers in zip(predictions, references, strict=True):
        mentioned = {objects_by_name[name] for name in pattern.findall(prediction.lower())}
        named.append(len(mentioned))
        wrong.append(len(mentioned - set(answers)))
    return np.array(named), np.array(wrong)
