"""Objects that a caption names and that are not in the picture (CHAIR), Rohrbach et al. 2018, arXiv:1809.02156.

An item's references are the objects in its picture. The vocabulary is all references of all items; a caption names an
object if it holds it, or its plural, as whole words. An object's other names stand behind it, with "|" between:
``"couch|sofa"``. The paper's own figures are of COCO's 80 kinds with the authors' list of names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from mllm.eval.metrics.checks import check

from mllm.evaluation import Score

VERSION = "1"


def per_object(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return CHAIRi: of all objects that captions name, the share that is not there. An item's value is its own share.

    A caption that names an object twice names it once here.
    """
    named, wrong = _counts(predictions, references)

    def alone(chosen: Sequence[int]) -> float:
        return float(wrong[chosen].sum() / max(1, named[chosen].sum()))

    per_item = (wrong / np.maximum(named, 1)).tolist()
    return Score(alone(range(len(named))), per_item, "caption/chair-i", VERSION, better="lower", alone=alone)


def per_caption(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return CHAIRs: the share of captions that name an object which is not there."""
    _, wrong = _counts(predictions, references)
    per_item = (wrong > 0).astype(float)
    return Score(float(per_item.mean()), per_item.tolist(), "caption/chair-s", VERSION, better="lower")


def _counts(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Return how many objects each caption names, and how many of them are not there: (N,) each."""
    check(predictions, references)
    objects = {reference for answers in references for reference in answers}
    names = {name.strip().lower(): known for known in sorted(objects) for name in known.split("|") if name.strip()}
    # Of two names that start at one place the longer counts: a "hot dog" is no dog.
    either = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    pattern = re.compile(rf"(?<!\w)({either})(?:s|es)?(?!\w)")
    named, wrong = [], []
    for prediction, answers in zip(predictions, references, strict=True):
        found = {names[name] for name in pattern.findall(prediction.lower())}
        named.append(len(found))
        wrong.append(len(found - set(answers)))
    return np.array(named), np.array(wrong)
