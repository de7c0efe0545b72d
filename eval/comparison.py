"""Compare variations of a recipe: train and evaluate every combination of values, and tabulate runs by suites.

Notable: what is finished is not done again. A run's folder is named by what its training depends on, an evaluation's
by what its answers depend on, so a comparison that was interrupted, or that is given further values, continues.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from mllm.eval.comparison_page import Comparison, Entry, Result, Row, write_comparison
from mllm.eval.scoring import score_interval
from mllm.eval.suite import load_suite, read_items
from mllm.eval.variations import Combination, answering, combinations, training_identity, values_in

from mllm.build import load
from mllm.config.messages import checked
from mllm.config.suites import EvalSpec, SuiteSpec
from mllm.data.files import json_lines, json_of
from mllm.errors import MLLMError
from mllm.evaluation import Score, evaluate, metric
from mllm.processes import in_main_process, processes
from mllm.saving import is_saved
from mllm.training.train import train, train_needs
from mllm.version import __version__

SEEDS = (0, 1, 2)
FILES = ("summary.json", "predictions.jsonl", "report.html")  # of a finished evaluation, in the order they are written


@dataclass(frozen=True)
class _Task:
    """A suite as it is run in this comparison."""

    suite: SuiteSpec
    data: str | Path | None
    limit: int | None
    baselines: tuple[str, ...]

    def folder(self, run: Path, settings: dict[str, Any]) -> Path:
        """Return the folder of the evaluation of a run that answers by ``settings``."""
        suite = load_suite(self.suite.suite, self.suite.overrides)
        facts = [suite, str(self.data), self.limit, self.baselines, settings, __version__]
        return run / "eval" / f"{self.suite.folder}-{_digest(repr(facts))}"


@dataclass(frozen=True)
class _Evaluation:
    """A finished evaluation, as its folder has it."""

    folder: Path
    summary: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def ids(self) -> list[str]:
        """Return the items' ids: those that did not fit into a model's context are missing."""
        return [row["id"] for row in self.rows]

    def corpus_metrics(self) -> set[str]:
        """Return the metrics of texts whose value is not the mean over items, such as BLEU."""
        names = {score.name for score in self.scores() if not np.isclose(np.mean(score.per_item or 0.0), score.value)}
        return {name for name in names if len(inspect.signature(metric(name)).parameters) == 2}

    def scores(self, scored_again: Container[str] = ()) -> Iterator[Score]:
        """Yield the metrics' scores; those of some metrics with what parts of the items score, for an interval."""
        for entry in self.summary["metrics"]:
            name = entry["name"]
            if name in scored_again:
                yield metric(name)([row["prediction"] for row in self.rows], [row["references"] for row in self.rows])
            else:
                per_item = [row["scores"][name] for row in self.rows if name in row["scores"]]
                yield Score(entry["value"], per_item, name, entry["version"], entry["better"])


def compare_variations(
    name: str,
    overrides: Sequence[str] = (),
    *,
    vary: Sequence[str],
    suites: str | None = None,
    out: str | Path | None = None,
    runs: str | Path | None = None,
    seeds: Sequence[int] = SEEDS,
    limit: int | None = None,
    data: str | Path | None = None,
    baselines: Sequence[str] = (),
    progress: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Train and evaluate variations of a recipe with several seeds, and compare each with the recipe as it stands.

    Args:
        name: a recipe's name, or the path of one.
        overrides: of all runs.
        vary: which keys change, ``["lm.model=a,b"]``; see `mllm.eval.variations.combinations`. Every combination of
            their values is compared.
        suites: names with commas, or mappings as in ``eval.suites``; None: those of the recipe.
        out: the folder of ``report.html``, ``table.md`` and ``comparison.json``; None: ``runs/compare/NAME``.
        runs: the folder of the runs; None: ``runs`` in ``out``. A finished run or evaluation in it is not repeated, an
            interrupted one continues.
        seeds: one run each.
        limit: the first items of each suite only; None: as the recipe says.
        data: the folder of suites' files.
        baselines: of each evaluation; they are shown in its own report.
        progress: called with a line on each run.

    Raises:
        MLLMError: a variation or a suite that is wrong: nothing is trained then. Or a run that cannot be continued.
    """
    processes()
    made = combinations(name, overrides, vary)
    config = made[0].load()
    limit = limit or config.eval.limit
    tasks = [_Task(suite, suite.data or data, limit, tuple(baselines)) for suite in _suites(config.eval, suites)]
    for task in tasks:
        read_items(load_suite(task.suite.suite, task.suite.overrides), task.data)
    folder = Path(out or Path("runs") / "compare" / config.name)
    evaluations: dict[str, list[list[_Evaluation]]] = {each.label: [] for each in made}  # by combination, seed, suite
    for seed in seeds:
        for number, each in enumerate(made, start=1):
            progress(f"seed {seed}, {number} of {len(made)}: {each.label or 'the recipe as it stands'}")
            run = _run(each, seed, Path(runs or folder / "runs"))
            evaluations[each.label].append(_evaluations(each, seed, run, tasks))
    labels = [task.suite.label for task in tasks]
    rows = [Row(label or config.name, _results(labels, evaluations, label)) for label in evaluations]
    comparison = Comparison(config.name, config.about, list(seeds), limit, labels, rows)
    in_main_process(lambda: write_comparison(folder, comparison))
    return comparison


def _suites(spec: EvalSpec, text: str | None) -> list[SuiteSpec]:
    """Return the suites that are named, or else the recipe's.

    Raises:
        MLLMError: there are none, or one is wrong.
    """
    named = None if text is None else values_in(text, "--suites")
    suites = spec.suites if named is None else checked(EvalSpec, {"suites": named}, label="--suites").suites
    if not suites:
        raise MLLMError("The recipe names no suites (eval.suites). Name some: --suites coco-karpathy,nocaps.")
    return suites


def _run(each: Combination, seed: int, runs: Path) -> Path:
    """Return the folder of a combination's run: a finished one, an interrupted one that is continued, or a new one."""
    config = each.load(seed)
    label = re.sub(r"[^\w.=+-]+", "_", each.trained_label or config.name)[:80].strip("_")
    name = f"{seed}-{_digest(training_identity(config))}"
    folder = next(runs.glob(f"*-{name}"), runs / f"{label}-{name}")  # other overrides may give the same recipe
    state = [folder, is_saved(folder), (folder / "recipe.yaml").is_file()]
    folder, finished, started = broadcast_object_list(state)  # of the main process: the others may look later
    if finished:
        train_needs(config)  # its model may have one of these runs inside it
    elif started:
        train(str(folder / "recipe.yaml"), resume=folder)
    else:
        train(each.recipe, each.training_overrides(seed), out=folder)
    return folder


def _evaluations(each: Combination, seed: int, run: Path, tasks: Sequence[_Task]) -> list[_Evaluation]:
    """Return a run's evaluations; those that are not finished are made or continued."""
    settings = answering(each.load(seed))
    folders = [task.folder(run, settings) for task in tasks]
    waiting = broadcast_object_list([not all((at / name).is_file() for name in FILES) for at in folders])
    if any(waiting):
        model = load(run)
        model.spec = model.spec.model_copy(update=settings)
        for task, folder, is_missing in zip(tasks, folders, waiting, strict=True):
            if is_missing:
                evaluate(
                    model,
                    task.suite.suite,
                    task.data,
                    limit=task.limit,
                    out=folder,
                    run=str(run),
                    baselines=task.baselines,
                    overrides=task.suite.overrides,
                )
    return [_Evaluation(at, json_of(at / FILES[0]), json_lines(at / FILES[1])) for at in folders]


def _results(suites: Sequence[str], evaluations: dict[str, list[list[_Evaluation]]], label: str) -> dict[str, Result]:
    """Return a combination's results by suite; those of the recipe as it stands have no gain."""
    results = {}
    for place, suite in enumerate(suites):
        ours = [of_seed[place] for of_seed in evaluations[label]]
        theirs = [of_seed[place] for of_seed in evaluations[""]] if label else []
        theirs = theirs if all(each.ids == ours[0].ids for each in [*ours, *theirs]) else []
        corpus = set().union(*(each.corpus_metrics() for each in [*ours, *theirs]))
        baseline = zip(*(each.scores(corpus) for each in theirs), strict=True) if theirs else None
        metrics = list(zip(*(each.scores(corpus) for each in ours), strict=True))
        entries = [_entry(runs, next(baseline) if baseline else ()) for runs in metrics]
        results[suite] = Result(min(len(each.rows) for each in ours), [str(each.folder) for each in ours], entries)
    return results


def _entry(runs: Sequence[Score], baseline: Sequence[Score]) -> Entry:
    values = [score.value for score in runs]
    gain = fmean(values) - fmean(score.value for score in baseline) if baseline else None
    low, high = score_interval(runs)
    gain_low, gain_high = score_interval(runs, baseline) if baseline else (None, None)
    return Entry(runs[0].name, runs[0].better, values, fmean(values), low, high, gain, gain_low, gain_high)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
