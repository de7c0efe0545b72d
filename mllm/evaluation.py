"""The door to `mllm.eval`: run a suite, score predictions, compare evaluations, find a metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from mllm.registry import lookup

if TYPE_CHECKING:
    from mllm.assembly import Assembly


def evaluate(
    model: Assembly,
    suite: str,
    data: str | Path | None = None,
    *,
    limit: int | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> Any:
    """Run a suite on a model, with its baselines; see `mllm.eval.evaluate.evaluate`."""
    return import_module("mllm.eval.evaluate").evaluate(model, suite, data, limit=limit, out=out, **options)


def score(path: str | Path, suite: str, data: str | Path | None = None, **options: Any) -> Any:
    """Score a file of predictions; see `mllm.eval.predictions.score`."""
    return import_module("mllm.eval.predictions").score(path, suite, data, **options)


def compare(one: str | Path, other: str | Path, data: str | Path | None = None, **options: Any) -> Any:
    """Hold one evaluation against another; see `mllm.eval.predictions.compare`."""
    return import_module("mllm.eval.predictions").compare(one, other, data, **options)


def verify(name: str, **options: Any) -> Path:
    """Train a recipe with several seeds and compare it with its baselines; see `mllm.eval.verify.verify`."""
    path: Path = import_module("mllm.eval.verify").verify(name, **options)
    return path


def results_table(names: Sequence[str], folder: str | Path | None = None) -> str:
    """Return the table of the recipes' results; see `mllm.eval.results.table`."""
    return str(import_module("mllm.eval.results").table(names, folder))


def result_lines(name: str) -> list[str]:
    """Return lines on a recipe's size and results, none where nothing is known of it."""
    results = import_module("mllm.eval.results")
    return [line for line in (f"trained weights: {results.size(name)}", results.summary(name)) if line]


def metric(name: str) -> Callable[[Sequence[str], Sequence[Sequence[str]]], Score]:
    """Return a metric by name (``caption/cider-d``, ``vqa/official``, ...): a function of predictions and references.

    Raises:
        MLLMError: no metric has that name.
    """
    found: Callable[[Sequence[str], Sequence[Sequence[str]]], Score] = lookup("metrics", name)
    return found


@dataclass(frozen=True)
class Score:
    """One metric's result: the corpus value, the value of each item in the order given, and what computed it."""

    value: float
    per_item: list[float]  # empty where only the whole has a value
    name: str  # the registry name, e.g. "caption/cider-d"
    version: str  # raised when the same input would score differently
    better: str = "higher"  # or "lower"
    alone: Callable[[Sequence[int]], float] | None = field(default=None, compare=False, repr=False)

    def of(self, items: Sequence[int]) -> float:
        """Return the value of some of the items alone, where an item may be named several times; not for all scores."""
        return self.alone(items) if self.alone else fmean(self.per_item[item] for item in items)
