"""Score answers: metrics, confidence intervals, gains over baselines, a breakdown by kind, one row per item."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from mllm.build import open_part
from mllm.config.base import PartSpec
from mllm.data.items import Item
from mllm.devices import choose_device
from mllm.errors import MLLMError
from mllm.evaluation import Score
from mllm.registry import lookup

RESAMPLES = 2000
MODEL = "model"  # the condition that is evaluated; the others are what it is compared with


@dataclass
class Result:
    """One condition's predictions, and their scores by metric."""

    predictions: list[str]
    scores: dict[str, Score] = field(default_factory=dict)


class Helpers:
    """The models that some metrics and answer modes use, loaded when first used.

    Args:
        scorer: a scorer of the registry, such as a dual encoder (CLIPScore).
        judge: a language model, by hub id or folder (CLAIR).
        default: returns the evaluated model's own scorer, for a suite that names none.
        device: where they compute; None: a GPU where there is one.
    """

    def __init__(
        self,
        scorer: PartSpec | None = None,
        judge: str | None = None,
        default: Callable[[], Any] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._scorer, self._judge, self._default, self._device = scorer, judge, default, device

    @cached_property
    def scorer(self) -> Any:
        """The suite's scorer, or else the evaluated model's own."""
        if self._scorer is not None:
            return open_part(("scorers",), self._scorer, choose_device(self._device))
        if self._default is not None:
            return self._default()
        raise MLLMError("This suite needs a scorer: set scorer={type: dual-encoder, model: ...} (CLIP, ...).")

    @cached_property
    def judge(self) -> Any:
        """The language model that judges."""
        if self._judge is None:
            raise MLLMError("This suite needs a judge: set judge=FOLDER-OR-ID of a language model.")
        return lookup("lms", "transformers")(model=self._judge).to(choose_device(self._device))


def measure(metric: str, predictions: Sequence[str], items: Sequence[Item], helpers: Helpers) -> Score:
    """Return a metric's score of the items' predictions.

    A metric whose signature has the keywords ``images`` (a list for each item), ``scorer`` or ``judge`` gets them.

    Raises:
        MLLMError: the metric needs a model that the suite does not name, or refuses the predictions or references.
    """
    function = lookup("metrics", metric)
    keywords: dict[str, Any] = {}
    for name in inspect.signature(function).parameters:
        if name == "images":
            keywords[name] = [list(item.images) for item in items]
        elif name == "scorer":
            keywords[name] = helpers.scorer
        elif name == "judge":
            keywords[name] = helpers.judge
    score: Score = function(list(predictions), [item.answers for item in items], **keywords)
    return score


def tally(metrics: Sequence[str], items: Sequence[Item], results: Mapping[str, Result]) -> dict[str, Any]:
    """Return the part of a summary that the scores determine: ``n``, ``baselines``, ``metrics``, ``kinds``."""
    return {
        "n": len(items),
        "baselines": [name for name in results if name != MODEL],
        "metrics": [_entry(name, results) for name in metrics],
        "kinds": _kinds(items, results[MODEL]),
    }


def rows(
    items: Sequence[Item], results: Mapping[str, Result], words: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Return the report's row of each item; ``words``: of its images, by its id."""
    return [
        {
            "id": item.id,
            "kind": item.kind,
            "question": item.question or "".join(piece for piece in item.document if isinstance(piece, str)) or None,
            "references": list(item.answers),
            "prediction": results[MODEL].predictions[index],
            "baselines": {name: result.predictions[index] for name, result in results.items() if name != MODEL},
            "scores": {name: score.per_item[index] for name, score in results[MODEL].scores.items() if score.per_item},
            **({"words": words[item.id]} if words and item.id in words else {}),
        }
        for index, item in enumerate(items)
    ]


def _entry(metric: str, results: Mapping[str, Result]) -> dict[str, Any]:
    score = results[MODEL].scores[metric]
    low, high = score_interval([score])
    entry: dict[str, Any] = {"name": metric, "version": score.version, "better": score.better}
    entry |= {"value": score.value, "low": low, "high": high, "baselines": {}}
    for name, result in results.items():
        if name != MODEL:
            other = result.scores[metric]
            low, high = score_interval([score], [other])
            gain = {"value": other.value, "gain": score.value - other.value, "low": low, "high": high}
            entry["baselines"][name] = gain
    return entry


def score_interval(runs: Sequence[Score], others: Sequence[Score] = ()) -> tuple[float | None, float | None]:
    """Return the 95 % interval of the mean score of some runs, or of its paired difference from that of others.

    Items are drawn with replacement, each with its scores in all runs. None, None: the metric scores all items
    together, or the runs were scored on different numbers of items.
    """
    weighted = [(score, 1 / len(runs)) for score in runs] + [(score, -1 / len(others)) for score in others]
    sizes = {len(score.per_item) for score, _ in weighted}
    if len(sizes) > 1 or 0 in sizes:
        return None, None
    if all(np.isclose(np.mean(score.per_item), score.value) for score, _ in weighted):
        return interval(sum(weight * np.asarray(score.per_item) for score, weight in weighted))
    if not all(score.alone for score, _ in weighted):
        return None, None
    samples = _resampled(sizes.pop())
    return _percentiles([sum(weight * score.of(sample) for score, weight in weighted) for sample in samples])


def interval(values: Any, *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of ``values (N,)``; it is paired if they are differences."""
    return _percentiles([float(values[sample].mean()) for sample in _resampled(len(values), resamples, seed)])


def _resampled(number: int, resamples: int = RESAMPLES, seed: int = 0) -> Iterator[Any]:
    """Yield bootstrap samples: indices ``(N,)`` of N items, drawn with replacement."""
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        yield generator.integers(0, number, number)


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _kinds(items: Sequence[Item], result: Result) -> dict[str, dict[str, float]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        groups[item.kind or "all"].append(index)
    return {
        kind: {"n": len(members)} | {name: score.of(members) for name, score in result.scores.items() if score.per_item}
        for kind, members in sorted(groups.items())
    }
