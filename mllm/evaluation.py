"""The door to `mllm.eval`: run a suite, score predictions, compare evaluations, find a metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from mllm.model import Assembly
from mllm.registry import lookup
from mllm.scores import Score


def evaluate(
    model: Assembly,
    suite: str,
    data: str | Path | None = None,
    *,
    limit: int | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> Any:
    """Run a suite on a model, with its baselines; see `mllm.eval.runner.evaluate`."""
    return import_module("mllm.eval.runner").evaluate(model, suite, data, limit=limit, out=out, **options)


def score(path: str | Path, suite: str, data: str | Path | None = None, **options: Any) -> Any:
    """Score a file of predictions; see `mllm.eval.predictions.score`."""
    return import_module("mllm.eval.predictions").score(path, suite, data, **options)


def compare(one: str | Path, other: str | Path, data: str | Path | None = None, **options: Any) -> Any:
    """Hold one evaluation against another; see `mllm.eval.predictions.compare`."""
    return import_module("mllm.eval.predictions").compare(one, other, data, **options)


def metric(name: str) -> Callable[[Sequence[str], Sequence[Sequence[str]]], Score]:
    """Return a metric by name (``caption/cider-d``, ``vqa/official``, ...): a function of predictions and references.

    Raises:
        MLLMError: no metric has that name.
    """
    found: Callable[[Sequence[str], Sequence[Sequence[str]]], Score] = lookup("metrics", name)
    return found
