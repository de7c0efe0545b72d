"""Compute ROUGE-L of captions, with the conventions of the COCO caption evaluation.

Lin 2004, https://aclanthology.org/W04-1013. Captions are PTB-tokenised.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from mllm.eval.metrics.checks import check
from mllm.eval.metrics.ptb import tokenize

from mllm.evaluation import Score

VERSION = "1"

_BETA = 1.2  # how much more recall counts than precision


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return ROUGE-L: longest common subsequences of words, with the best precision and recall over references."""
    check(predictions, references)
    per_item = [_rouge_l(*item) for item in zip(predictions, references, strict=True)]
    return Score(fmean(per_item), per_item, "caption/rouge-l", VERSION)


def _rouge_l(prediction: str, references: Sequence[str]) -> float:
    predicted = tokenize(prediction).split(" ")  # unlike BLEU, an empty caption counts as one empty word
    answers = [tokenize(reference).split(" ") for reference in references]
    common = [_common(predicted, answer) for answer in answers]
    precision = max(common) / len(predicted)
    recall = max(length / len(answer) for length, answer in zip(common, answers, strict=True))
    if precision == 0:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _common(first: list[str], second: list[str]) -> int:
    """Return the length of the longest common subsequence; the bits of a number are a row of the usual table.

    A zero bit is an index of ``first`` where the row's value rises by one (Hyyrö 2004, "Bit-parallel LCS-length
    computation revisited").
    """
    positions: dict[str, int] = {}  # of each word, as bits
    for position, word in enumerate(first):
        positions[word] = positions.get(word, 0) | 1 << position
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        match = row & positions.get(word, 0)
        row = (row + match | row - match) & full
    return len(first) - row.bit_count()
