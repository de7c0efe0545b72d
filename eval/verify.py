"""Verify a recipe: train it with several seeds, evaluate it with baselines, pool the scores, write the results.

The table of recipes in the documentation is generated from these files; none of its figures is typed by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mllm.eval.scoring import interval
from mllm.eval.suite import load_suite
from omegaconf import OmegaConf

from mllm.build import load
from mllm.config import loading as recipes
from mllm.config.suites import SuiteSpec
from mllm.errors import MLLMError
from mllm.evaluation import evaluate, metric
from mllm.saving import is_saved
from mllm.system import read_json, write
from mllm.training.train import train, train_needs

SEEDS = (0, 1, 2)


def verify(name: str, *, out: str | Path, seeds: Sequence[int] = SEEDS, runs: str | Path = "runs/verify") -> Path:
    """Train a recipe with several seeds, evaluate its suites, and write ``out/NAME.yaml``.

    Runs that it needs are trained first, where the recipe names them, once for all seeds.

    Args:
        name: a recipe's name, or the path of one.
        out: the folder of results.
        seeds: one run each.
        runs: the folder of the runs. A finished run of the same recipe is evaluated again, and not trained again.

    Raises:
        MLLMError: the recipe names no suites, or a folder has another recipe's run.
    """
    config = recipes.load(name)
    if not config.eval.suites:
        raise MLLMError(f"The recipe {name} names no suites to be evaluated by: give eval.suites.")
    suites = {suite.label: suite for suite in config.eval.suites}
    reports: dict[str, list[list[dict[str, Any]]]] = {label: [] for label in suites}
    minutes = []
    for seed in seeds:
        folder = _run(name, seed, Path(runs) / f"{config.name}-{seed}")
        minutes.append(_minutes(folder))
        model = load(folder)
        for label, suite in suites.items():
            report = evaluate(
                model,
                suite.suite,
                suite.data,
                limit=config.eval.limit,
                out=folder / "eval" / suite.folder,
                run=config.name,
                overrides=suite.overrides,
            )
            reports[label].append(report.rows)
    content = {
        "recipe": config.name,
        "seeds": list(seeds),
        "minutes": round(max(minutes), 1),
        "items": {label: len(rows[0]) for label, rows in reports.items()},
        "scores": {label: pooled(rows, headline(suites[label])) for label, rows in reports.items()},
        "command": f"mllm recipes verify {name}",
    }
    path = Path(out) / f"{config.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, lambda file: file.write_text(OmegaConf.to_yaml(OmegaConf.create(content), sort_keys=False)))
    return path


def pooled(runs: Sequence[Sequence[dict[str, Any]]], name: str) -> dict[str, Any]:
    """Return a metric's mean over runs, and its gain over each baseline with a 95 % interval.

    Args:
        runs: the rows of one suite's report, run by run, over the same items in the same order.
        name: of the metric. Its value must be the mean over items.

    Items are drawn with replacement, each with its gains in all runs: more runs do not make the interval narrower
    as more items would.
    """
    ids = [[row["id"] for row in rows] for rows in runs]
    if any(run_ids != ids[0] for run_ids in ids):
        raise MLLMError("Runs are pooled over the same items in the same order; these reports have different ones.")
    references = [row["references"] for row in runs[0]]
    baselines = list(runs[0][0]["baselines"])
    score = metric(name)

    def values(prediction: Any) -> Any:
        """Return a condition's scores ``(runs, items)``."""
        return np.array([score([prediction(row) for row in rows], references).per_item for rows in runs])

    model = values(lambda row: row["prediction"])
    if not model.size:
        raise MLLMError(
            f"{name} scores all items together, and runs are pooled item by item: name another metric first."
        )
    result: dict[str, Any] = {"metric": name, "value": round(float(model.mean()), 4), "gains": {}}
    for baseline in baselines:
        other = values(lambda row, baseline=baseline: row["baselines"][baseline])
        low, high = interval((model - other).mean(0))
        result["gains"][baseline] = {
            "value": round(float(other.mean()), 4),
            "gain": round(float((model - other).mean()), 4),
            "low": round(low, 4),
            "high": round(high, 4),
        }
    return result


def has_embedded_suites(name: str) -> bool:
    """Whether a recipe names suites, and none of them needs a folder of files."""
    suites = recipes.load(name).eval.suites
    return bool(suites) and not any(load_suite(suite.suite, suite.overrides).folder for suite in suites)


def headline(suite: SuiteSpec) -> str:
    """Return a suite's first metric, by which recipes are compared."""
    return str(load_suite(suite.suite, suite.overrides).metrics[0])


def _run(name: str, seed: int, folder: Path) -> Path:
    """Return the folder of a run of the recipe with this seed: a finished one, or a new one."""
    config = recipes.load(name, {"seed": seed})
    if is_saved(folder):
        if (folder / "recipe.yaml").read_text() == recipes.dump(config):
            train_needs(config)  # its model may have one of these runs inside it
            return folder
        raise MLLMError(f"{folder} is a run of another recipe or version. Move it away, or give another --runs folder.")
    train(name, {"seed": seed}, out=folder)
    return folder


def _minutes(run: Path) -> float:
    """Return how long a run was trained, since it was last started."""
    file = run / "time.json"
    try:
        return float(read_json(file)["minutes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MLLMError(f"{file} cannot be read: {error}. Remove the run's folder to train it again.") from None
