"""Compute BLEU-1 to BLEU-4 of captions, with the conventions of the COCO caption evaluation.

The corpus value is not the mean over items: matches and lengths are summed over the corpus first (Papineni et al.
2002, https://aclanthology.org/P02-1040). Captions are PTB-tokenised; the reference length is the closest one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from mllm.eval.metrics.checks import check
from mllm.eval.metrics.ngrams import Ngrams, count_ngrams, words

from mllm.evaluation import Score

VERSION = "1"

# The COCO evaluation's constants: no match scores almost 0, and nothing is divided by 0.
_TINY, _SMALL = 1e-15, 1e-9


class _Matches(NamedTuple):
    """The counts that BLEU sums over the corpus; index n - 1 is for n-grams."""

    matched: list[int]
    possible: list[int]
    length: int
    reference_length: int

    def bleu(self) -> float:
        precisions = ((m + _TINY) / (p + _SMALL) for m, p in zip(self.matched, self.possible, strict=True))
        ratio = (self.length + _TINY) / (self.reference_length + _SMALL)
        return math.prod(precisions) ** (1 / len(self.matched)) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0)


def _matches(order: int, prediction: str, references: Sequence[str]) -> _Matches:
    predicted = words(prediction)
    answers = [words(reference) for reference in references]
    most = Ngrams()
    for answer in answers:
        most |= count_ngrams(answer, order)  # the largest count in any reference
    matched = [0] * order
    for ngram, count in (count_ngrams(predicted, order) & most).items():
        matched[len(ngram) - 1] += count
    closest = min((abs(len(answer) - len(predicted)), len(answer)) for answer in answers)[1]
    return _Matches(matched, [max(0, len(predicted) - n) for n in range(order)], len(predicted), closest)


def _bleu(order: int, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    check(predictions, references)
    items = [_matches(order, *item) for item in zip(predictions, references, strict=True)]
    table = np.array([[*item.matched, *item.possible, item.length, item.reference_length] for item in items])

    def alone(chosen: Sequence[int]) -> float:
        total = table[chosen].sum(axis=0).tolist()
        return _Matches(total[:order], total[order:-2], *total[-2:]).bleu()

    value = alone(range(len(items)))
    return Score(value, [item.bleu() for item in items], f"caption/bleu-{order}", VERSION, alone=alone)


bleu_1 = partial(_bleu, 1)
bleu_2 = partial(_bleu, 2)
bleu_3 = partial(_bleu, 3)
bleu_4 = partial(_bleu, 4)
