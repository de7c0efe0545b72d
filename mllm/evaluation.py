"""Give access to `mllm.eval`: run a suite, score predictions, compare evaluations, find a metric.

Nothing else in this package imports `mllm.eval`, and these functions import it only when they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from mllm.errors import MLLMError, near
from mllm.registry import lookup

if TYPE_CHECKING:
    from mllm.assembly import Assembly
    from mllm.data.items import Item

BENCHES = {  # name -> module
    "train": "train",
    "generate": "generate",
    "eval": "evaluate",
    "serve": "serve",
    "matrix": "matrix",
}


@dataclass(frozen=True)
class Report:
    """The result of an evaluation.

    Attributes:
        summary: figures, intervals, settings, versions: what ``summary.json`` holds.
        rows: one for each item: what ``predictions.jsonl`` holds.
        page: the HTML report; None where nothing is written.
    """

    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    page: Path | None

    def __getitem__(self, metric: str) -> dict[str, Any]:
        """Return one metric's entry of the summary: value, low, high, baselines."""
        return next(entry for entry in self.summary["metrics"] if entry["name"] == metric)


@dataclass(frozen=True)
class Score:
    """The result of one metric: the corpus value, the value of each item in the order given, and what computed it."""

    value: float
    per_item: list[float]  # empty where only the whole has a value
    name: str  # the registry name, e.g. "caption/cider-d"
    version: str  # raised when the same input would score differently
    better: str = "higher"  # or "lower"
    alone: Callable[[Sequence[int]], float] | None = field(default=None, compare=False, repr=False)

    def of(self, items: Sequence[int]) -> float:
        """Return the value of some of the items alone, where an item may be named several times; not for all scores."""
        return self.alone(items) if self.alone else fmean(self.per_item[item] for item in items)


def evaluate(
    model: Assembly,
    suite: str,
    data: str | Path | None = None,
    *,
    limit: int | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> Report:
    """Run a suite on a model, with its baselines; see `mllm.eval.evaluate.evaluate`."""
    report: Report = _eval("evaluate").evaluate(model, suite, data, limit=limit, out=out, **options)
    return report


def score(path: str | Path, suite: str, data: str | Path | None = None, **options: Any) -> Report:
    """Score a file of predictions; see `mllm.eval.predictions.score`."""
    report: Report = _eval("predictions").score(path, suite, data, **options)
    return report


def compare(one: str | Path, other: str | Path, data: str | Path | None = None, **options: Any) -> Report:
    """Compare two evaluations item by item; see `mllm.eval.predictions.compare`."""
    report: Report = _eval("predictions").compare(one, other, data, **options)
    return report


def verify(name: str, **options: Any) -> Path:
    """Train a recipe with several seeds and compare it with its baselines; see `mllm.eval.verify.verify`."""
    path: Path = _eval("verify").verify(name, **options)
    return path


def compare_variations(name: str, overrides: Sequence[str] = (), **options: Any) -> str:
    """Train, evaluate and compare variations of a recipe, and return the table; see `mllm.eval.comparison`."""
    comparison = _eval("comparison").compare_variations(name, overrides, **options)
    pages = _eval("comparison_page")
    return f"{pages.table(comparison)}\n{pages.notes(comparison)}"


def suite_items(suite: str, data: str | Path | None = None, overrides: Sequence[str] = ()) -> list[Item]:
    """Return the items of a suite; see `mllm.eval.suite.read_items`."""
    suites = _eval("suite")
    items: list[Item] = suites.read_items(suites.load_suite(suite, overrides), data)
    return items


def check_suite(suite: str, overrides: Sequence[str] = ()) -> None:
    """Read a suite's settings, not its data; see `mllm.eval.suite.load_suite`."""
    _eval("suite").load_suite(suite, overrides)


def has_embedded_suites(name: str) -> bool:
    """Whether a recipe names suites whose data are all embedded; see `mllm.eval.verify.has_embedded_suites`."""
    return bool(_eval("verify").has_embedded_suites(name))


def results_table(names: Sequence[str], folder: str | Path | None = None) -> str:
    """Return the table of the recipes' results; see `mllm.eval.results.table`."""
    return str(_eval("results").table(names, folder))


def result_lines(name: str) -> list[str]:
    """Return lines on a recipe's size and results, none where neither is known."""
    results = _eval("results")
    return [line for line in (f"trained weights: {results.size(name)}", results.summary(name)) if line]


def bench(name: str, **options: Any) -> None:
    """Run a benchmark of speed, or the matrix of parts; see the ``run`` of its module in `mllm.eval.bench`.

    Raises:
        MLLMError: no benchmark has that name.
    """
    if name not in BENCHES:
        raise MLLMError(f"No bench is called {name!r}. {near(name, BENCHES)}")
    _eval(f"bench.{BENCHES[name]}").run(**options)


def metric(name: str) -> Callable[[Sequence[str], Sequence[Sequence[str]]], Score]:
    """Return a metric by name (``caption/cider-d``, ``vqa/official``, ...): a function of predictions and references.

    Raises:
        MLLMError: no metric has that name.
    """
    function: Callable[[Sequence[str], Sequence[Sequence[str]]], Score] = lookup("metrics", name)
    return function


def _eval(module: str) -> Any:
    return import_module(f"mllm.eval.{module}")
