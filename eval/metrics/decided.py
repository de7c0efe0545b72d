"""Score labels."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from mllm.eval.metrics.checks import check

from mllm.evaluation import Score

VERSION = "1"


def f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return macro F1, the mean over labels of F1; a constant answer to two equally frequent labels has 1/3."""
    check(predictions, references)
    true = [answers[0] for answers in references]
    labels = sorted({*true, *predictions})

    def of(items: Sequence[int]) -> float:
        return fmean(_f1([(predictions[i] == label, true[i] == label) for i in items]) for label in labels)

    return Score(of(range(len(true))), [], "decision/f1", VERSION)


def _f1(pairs: Sequence[tuple[bool, bool]]) -> float:
    right = sum(predicted and true for predicted, true in pairs)
    return 2 * right / max(1, sum(predicted for predicted, _ in pairs) + sum(true for _, true in pairs))
