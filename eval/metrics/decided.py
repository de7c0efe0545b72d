"""Score decisions between labels."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from mllm.eval.metrics.checks import check

from mllm.evaluation import Score

VERSION = "1"


def f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return the mean over labels of F1: always the same answer has a third of it, where two are equally frequent."""
    check(predictions, references)
    true = [answers[0] for answers in references]
    labels = sorted({*true, *predictions})

    def of(items: Sequence[int]) -> float:
        return fmean(_f1([(predictions[i] == label, true[i] == label) for i in items]) for label in labels)

    return Score(of(range(len(true))), [], "decision/f1", VERSION)


def _f1(pairs: Sequence[tuple[bool, bool]]) -> float:
    right = sum(said and so for said, so in pairs)
    return 2 * right / max(1, sum(said for said, _ in pairs) + sum(so for _, so in pairs))
