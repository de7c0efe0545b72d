"""Score rankings: a prediction lists ids, the best first, separated by spaces; the references are the relevant ids.

A relevant id that is not in the ranking is missed. A ranking that has an id twice is refused.
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
    """Return R@k as in image-text retrieval: 1 if any relevant id is among the first k, else 0."""
    return _mean(lambda hits, _: float(any(hits[:k])), predictions, references, f"retrieval/r@{k}")


recall_1, recall_5, recall_10 = partial(recall, 1), partial(recall, 5), partial(recall, 10)


def median_rank(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return the median rank of the first relevant id, from 1; a missed one has the rank after the last."""
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
    """Return the mean reciprocal rank of the first relevant id; 0 if all are missed."""
    return _mean(
        lambda hits, _: 1 / (hits.index(True) + 1) if any(hits) else 0.0, predictions, references, "retrieval/mrr"
    )


def ndcg(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return NDCG: the sum of 1 / log2(rank + 1) over relevant ids, divided by that of the best ranking."""

    def gain(hits: Sequence[bool], relevant: int) -> float:
        return _discounted(hits) / _discounted([True] * relevant)

    return _mean(gain, predictions, references, "retrieval/ndcg")


def ndcg_relevant(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return VisDial's NDCG, with graded relevance, cut off at the number of relevant ids (arXiv:1611.08669, v1.0).

    An id's relevance is how often it is among the references.
    """
    checked = _mean(lambda hits, _: 0.0, predictions, references, "retrieval/ndcg-relevant")
    per_item = []
    for prediction, answers in zip(predictions, references, strict=True):
        relevance = Counter(answers)
        gains = [relevance[name] for name in prediction.split()[: len(relevance)]]
        best = sorted(relevance.values(), reverse=True)
        per_item.append(_discounted(gains) / _discounted(best))
    return replace(checked, value=fmean(per_item), per_item=per_item)


def mean_average_precision(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return MAP: the mean over relevant ids of the precision at their rank, which is 0 for a missed one."""

    def average(hits: Sequence[bool], relevant: int) -> float:
        return sum(sum(hits[: rank + 1]) / (rank + 1) for rank, hit in enumerate(hits) if hit) / relevant

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
        ranked, relevant = prediction.split(), set(answers)
        if len(set(ranked)) < len(ranked):
            raise MLLMError(f"The ranking of item {item} has an id twice: expected each at most once.")
        per_item.append(rule([name in relevant for name in ranked], len(relevant)))
    return Score(fmean(per_item), per_item, name, VERSION)
