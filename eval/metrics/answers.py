"""Score short answers by the rules of single data sets: similar spellings, numbers within a tolerance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from mllm.eval.metrics.checks import check

from mllm.evaluation import Score

VERSION = "1"

_LEAST_SIMILAR = 0.5  # ANLS gives nothing below it
_TOLERANCE = 0.05  # of a number, relative to the reference


def anls(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return the average normalised Levenshtein similarity to the most similar reference, 0 below one half.

    The similarity is 1 - edit distance / length of the longer text, in lower case (Biten et al. 2019,
    https://arxiv.org/abs/1905.13648).
    """

    def nearest(prediction: str, answers: Sequence[str]) -> float:
        best = max(_similarity(_plain(prediction), _plain(answer)) for answer in answers)
        return best if best >= _LEAST_SIMILAR else 0.0

    return _mean(nearest, predictions, references, "vqa/anls")


def relaxed(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return the relaxed accuracy: numbers may differ by 5 % of the reference, words must be equal in lower case.

    Masry et al. 2022 (ChartQA), https://arxiv.org/abs/2203.10244. As there, "12%" is the number 0.12, a number with
    thousands separators is a word, and so is a reference of 0.
    """

    def right(prediction: str, answers: Sequence[str]) -> float:
        return float(any(_close(_plain(prediction), _plain(answer)) for answer in answers))

    return _mean(right, predictions, references, "vqa/relaxed")


def _mean(
    rule: Callable[[str, Sequence[str]], float],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    name: str,
) -> Score:
    check(predictions, references)
    per_item = [rule(*item) for item in zip(predictions, references, strict=True)]
    return Score(fmean(per_item), per_item, name, VERSION)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(one: str, other: str) -> float:
    longer = max(len(one), len(other))
    return 1.0 if not longer else 1 - _distance(one, other) / longer


def _distance(one: str, other: str) -> int:
    """Return the edit distance: insertions, deletions and replacements that turn one text into the other."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        above, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]


def _close(prediction: str, answer: str) -> bool:
    a, b = _number(prediction), _number(answer)
    return prediction == answer if a is None or not b else abs(a - b) <= _TOLERANCE * abs(b)


def _number(text: str) -> float | None:
    percent = text.endswith("%")
    try:
        return float(text.removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        return None
