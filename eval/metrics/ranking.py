"""Score rankings: a prediction holds ids, the best first, with blanks between; references are the ids that are right.

An id that is not in the ranking was not found. A ranking that names an id twice is refused.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean, median

from mllm.eval.metrics.checks import check

from mllm.errors import MLLMError
from mllm.evaluation import Score

VERSION = "1"


def recall(k: int, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return R@k as image-text retrieval has it: 1 where any right id is among the first k, else 0."""
    return _mean(lambda hits, _: float(any(hits[:k])), predictions, references, f"retrieval/r@{k}")


recall_1, recall_5, recall_10 = partial(recall, 1), partial(recall, 5), partial(recall, 10)


def median_rank(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return the median over items of the first right id's rank, from 1; one that was not found is behind the last."""
    ranks = _mean(
        lambda hits, _: float(hits.index(True) + 1 if any(hits) else len(hits) + 1),
        predictions,
        references,
        "retrieval/median-rank",
    ).per_item

    def of(items: Sequence[int]) -> float:
        return median(ranks[item] for item in items)

    return Score(median(ranks), ranks, "retrieval/median-rank", VERSION, better="lower", alone=of)


def mrr(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return the mean reciprocal rank of the first right id; 0 where none was found."""
    return _mean(
        lambda hits, _: 1 / (hits.index(True) + 1) if any(hits) else 0.0, predictions, references, "retrieval/mrr"
    )


def ndcg(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return the discounted gain (1 / log2(rank + 1) of each right id) over that of the best ranking."""

    def gain(hits: Sequence[bool], right: int) -> float:
        return _discounted(hits) / _discounted([True] * right)

    return _mean(gain, predictions, references, "retrieval/ndcg")


def ndcg_relevant(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return VisDial's gain: graded, and over as many first places as there are right ids (arXiv:1611.08669, v1.0).

    An id is as relevant as it is often told among the references.
    """
    found = _mean(lambda hits, _: 0.0, predictions, references, "retrieval/ndcg-relevant")
    per_item = []
    for prediction, answers in zip(predictions, references, strict=True):
        told = Counter(answers)
        gains = [told[name] for name in prediction.split()[: len(told)]]
        best = sorted(told.values(), reverse=True)
        per_item.append(_discounted(gains) / _discounted(best))
    return replace(found, value=fmean(per_item), per_item=per_item)


def mean_average_precision(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return the mean over right ids of the precision at their rank; an id that was not found counts 0."""

    def average(hits: Sequence[bool], right: int) -> float:
        return sum(sum(hits[: rank + 1]) / (rank + 1) for rank, hit in enumerate(hits) if hit) / right

    return _mean(average, predictions, references, "retrieval/map")


def _discounted(hits: Sequence[float]) -> float:
    return sum(hit / math.log2(rank + 2) for rank, hit in enumerate(hits))


def _mean(
    rule: Callable[[Sequence[bool], int], float],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    name: str,
) -> Score:
    check(predictions, references)
    per_item = []
    for item, (prediction, answers) in enumerate(zip(predictions, references, strict=True)):
        ranked, right = prediction.split(), set(answers)
        if len(set(ranked)) < len(ranked):
            raise MLLMError(f"The ranking of item {item} names an id twice: expected each at most once.")
        per_item.append(rule([name in right for name in ranked], len(right)))
    return Score(fmean(per_item), per_item, name, VERSION)
