"""From answers to figures: metrics, intervals, gains over what else answered, a breakdown by kind, an item a row."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from mllm.config.parts import PartSpec
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.evaluation import Score
from mllm.registry import lookup

RESAMPLES = 2000
OWN = "model"  # the condition that is evaluated; the others are what it is held against


@dataclass
class Result:
    """One condition's predictions, and their scores by metric."""

    predictions: list[str]
    scores: dict[str, Score] = field(default_factory=dict)


class Helpers:
    """Models that some metrics ask for, loaded when they do.

    Args:
        scorer: a dual encoder (CLIPScore).
        judge: a language model, by hub id or folder (CLAIR).
        own: returns the evaluated model's own scorer, for a suite that names none.
    """

    def __init__(
        self, scorer: PartSpec | None = None, judge: str | None = None, own: Callable[[], Any] | None = None
    ) -> None:
        self._scorer, self._judge, self._own = scorer, judge, own

    @cached_property
    def scorer(self) -> Any:
        """Return the scorer."""
        if self._scorer is not None:
            return lookup("scorers", self._scorer.type)(**self._scorer.options())
        if self._own is not None:
            return self._own()
        raise MLLMError("This metric needs a scorer: scorer={type: dual-encoder, model: ...} in the suite (CLIP, ...).")

    @cached_property
    def judge(self) -> Any:
        """Return the language model that judges."""
        if self._judge is None:
            raise MLLMError("This metric needs a judge: judge=FOLDER-OR-ID of a language model, in the suite.")
        return lookup("lms", "transformers")(model=self._judge)


def measure(metric: str, predictions: Sequence[str], items: Sequence[Item], helpers: Helpers) -> Score:
    """Score predictions of items. What a metric asks for by a keyword of its signature, it is given.

    The keywords: ``images`` (a list an item), ``scorer``, ``judge``.

    Raises:
        MLLMError: the metric needs a model that is not named, or finds something wrong.
    """
    found = lookup("metrics", metric)
    wanted: dict[str, Any] = {}
    for name in inspect.signature(found).parameters:
        if name == "images":
            wanted[name] = [list(item.images) for item in items]
        elif name in ("scorer", "judge"):
            wanted[name] = getattr(helpers, name)
    score: Score = found(list(predictions), [item.answers for item in items], **wanted)
    return score


def tally(metrics: Sequence[str], items: Sequence[Item], results: Mapping[str, Result]) -> dict[str, Any]:
    """Return the part of a summary that the scores decide: ``n``, ``baselines``, ``metrics``, ``kinds``."""
    return {
        "n": len(items),
        "baselines": [name for name in results if name != OWN],
        "metrics": [_entry(name, results) for name in metrics],
        "kinds": _kinds(items, results[OWN]),
    }


def rows(items: Sequence[Item], results: Mapping[str, Result]) -> list[dict[str, Any]]:
    """Return what the report shows of each item."""
    return [
        {
            "id": item.id,
            "kind": item.kind,
            "question": item.question or "".join(piece for piece in item.document if isinstance(piece, str)) or None,
            "references": list(item.answers),
            "prediction": results[OWN].predictions[index],
            "baselines": {name: result.predictions[index] for name, result in results.items() if name != OWN},
            "scores": {name: score.per_item[index] for name, score in results[OWN].scores.items() if score.per_item},
        }
        for index, item in enumerate(items)
    ]


def _entry(metric: str, results: Mapping[str, Result]) -> dict[str, Any]:
    score = results[OWN].scores[metric]
    low, high = _interval([score])
    entry: dict[str, Any] = {"name": metric, "version": score.version, "better": score.better}
    entry |= {"value": score.value, "low": low, "high": high, "baselines": {}}
    for name, result in results.items():
        if name != OWN:
            other = result.scores[metric]
            low, high = _interval([score, other])
            gain = {"value": other.value, "gain": score.value - other.value, "low": low, "high": high}
            entry["baselines"][name] = gain
    return entry


def _interval(scores: Sequence[Score]) -> tuple[float | None, float | None]:
    """Return the interval of a score, or of its difference from another's, item by item."""
    if not all(score.per_item for score in scores):
        return None, None
    signs = (1, -1)[: len(scores)]
    means = [np.isclose(np.mean(score.per_item), score.value) for score in scores]
    if all(means):
        return interval(sum(s * np.asarray(score.per_item) for s, score in zip(signs, scores, strict=True)))
    if not all(score.alone for score in scores):
        return None, None
    number = len(scores[0].per_item)
    values = [sum(s * score.of(d) for s, score in zip(signs, scores, strict=True)) for d in _draws(number)]
    return _middle(values)


def interval(values: Any, *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of ``values (N,)``; paired, where they are differences."""
    return _middle([float(values[draw].mean()) for draw in _draws(len(values), resamples, seed)])


def _draws(number: int, resamples: int = RESAMPLES, seed: int = 0) -> Any:
    draw = np.random.default_rng(seed)
    return (draw.integers(0, number, number) for _ in range(resamples))


def _middle(values: Sequence[float]) -> tuple[float, float]:
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
