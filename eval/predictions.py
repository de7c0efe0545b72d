"""Score answers that already exist: a file of predictions, or two evaluations that are compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm.eval.report import report
from mllm.eval.scoring import MODEL, Helpers, Result, measure
from mllm.eval.suite import Suite, data_hash, load_suite, read_items
from pydantic import BaseModel

from mllm.config.messages import checked
from mllm.data.files import json_lines, json_of, some
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.evaluation import Report
from mllm.version import __version__

_ANSWERS = ("prediction", "answer", "caption")  # keys of an answer in a row
_IDS = ("id", "question_id", "image_id", "questionId")


def score(
    path: str | Path,
    suite: str,
    data: str | Path | None = None,
    *,
    limit: int | None = None,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> Report:
    """Score a file of predictions that any system wrote.

    Args:
        path: JSON or lines of JSON, rows of an id (``id``, ``question_id``, ``image_id``) and an answer
            (``prediction``, ``answer``, ``caption``): our own ``predictions.jsonl``, or the official result files of
            VQA and COCO captions. It has every item of the suite once.
        suite, data, limit, out, overrides: as `mllm.eval.evaluate.evaluate` takes them.

    Raises:
        MLLMError: the file is damaged; an item is missing, unknown or there twice; an answer is not a string.
    """
    config = load_suite(suite, overrides)
    all_items = read_items(config, data)
    items = all_items[:limit]
    predictions = _read(Path(path), config)
    unknown = sorted(predictions.keys() - {item.id for item in all_items})
    missing = [item.id for item in items if item.id not in predictions]
    if unknown:
        raise MLLMError(f"{path}: {len(unknown)} ids are not in the suite {config.name}: {some(unknown)}.")
    if missing:
        raise MLLMError(
            f"{path}: {len(missing)} of the suite's {len(items)} items have no prediction: {some(missing)}. "
            "A part of the items is not scored as the whole."
        )
    results = {MODEL: _scored(config, items, predictions)}
    about = {"suite": config.model_dump(mode="json"), "data": data_hash(items), "mllm": __version__}
    settings = {"predictions": Path(path).name}
    return report(config, items, results, Path(out) if out else None, run=str(path), settings=settings, about=about)


class _Metric(BaseModel):
    """A metric in a summary."""

    name: str
    version: str


class _Fingerprints(BaseModel):
    """What identifies an evaluation in its summary."""

    suite: dict[str, Any]
    data: str


class _Summary(BaseModel):
    """What is read of a summary."""

    suite: str
    run: str
    settings: dict[str, str]
    metrics: list[_Metric]
    fingerprints: _Fingerprints


class _Row(BaseModel):
    """What is read of a row of an evaluation's predictions."""

    id: str
    references: list[str]
    question: str | None
    kind: str


def compare(
    one: str | Path, other: str | Path, data: str | Path | None = None, *, out: str | Path | None = None
) -> Report:
    """Compare two evaluations of the same items, paired item by item.

    Args:
        one: an evaluation's folder (``summary.json``, ``predictions.jsonl``).
        other: the folder of the second; the report shows it in the place of a baseline.
        data: the suite's folder, for the images in the page and for metrics that read them.
        out: where the report is written; None: nothing is written.

    Raises:
        MLLMError: suites, items, metrics or versions of metrics differ, or a file is damaged.
    """
    folders = (Path(one), Path(other))
    first, second = map(_summary, folders)
    _check_comparable(folders, first, second)
    config = checked(Suite, first["fingerprints"]["suite"], label=f"{one}/summary.json")
    items = _items(folders[0], config, data, first["fingerprints"]["data"])
    predictions = [_read(folder / "predictions.jsonl", config) for folder in folders]
    if predictions[0].keys() != predictions[1].keys():
        raise MLLMError(f"{one} and {other} cannot be compared: their predictions are of different items.")
    label = second["run"] or str(other)
    results = {name: _scored(config, items, texts) for name, texts in zip((MODEL, label), predictions, strict=True)}
    about = {"data": first["fingerprints"]["data"], "one": first["fingerprints"], "other": second["fingerprints"]}
    run, settings = f"{first['run'] or one} compared with {label}", _both(first["settings"], second["settings"])
    return report(config, items, results, Path(out) if out else None, run=run, settings=settings, about=about)


def _check_comparable(folders: Sequence[Path], first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    for name, a, b in (
        ("suites", first["suite"], second["suite"]),
        ("items", first["fingerprints"]["data"], second["fingerprints"]["data"]),
        ("metrics", _variants(first), _variants(second)),
    ):
        if a != b:
            raise MLLMError(f"{folders[0]} and {folders[1]} cannot be compared: their {name} differ ({a} and {b}).")


def _both(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of two evaluations, as ``first / second`` where they differ."""
    pairs = {name: (first.get(name), second.get(name)) for name in sorted({*first, *second})}
    return {name: a if a == b else f"{a} / {b}" for name, (a, b) in pairs.items()}


def _items(folder: Path, config: Suite, data: str | Path | None, fingerprint: str) -> list[Item]:
    """Return an evaluation's items: with their images where the data is given or embedded, else as its rows have them.

    Raises:
        MLLMError: the data is not what the evaluation was made on.
    """
    file = folder / "predictions.jsonl"
    rows = [checked(_Row, row, label=f"{file} is damaged").model_dump() for row in json_lines(file)]
    if not data and config.folder:
        return [Item(row["id"], (), tuple(row["references"]), row["question"], row["kind"]) for row in rows]
    by_id = {item.id: item for item in read_items(config, data)}
    if unknown := [row["id"] for row in rows if row["id"] not in by_id]:
        raise MLLMError(f"The item {unknown[0]!r} is not in the data.")
    items = [by_id[row["id"]] for row in rows]
    if data_hash(items) != fingerprint:
        raise MLLMError(f"The data in {data or 'this installation'} differs from that of the evaluation {folder}.")
    return items


def _scored(config: Suite, items: Sequence[Item], predictions: Mapping[str, str]) -> Result:
    helpers, answers = Helpers(config.scorer, config.judge), [predictions[item.id] for item in items]
    return Result(answers, {name: measure(name, answers, items, helpers) for name in config.metrics})


def _read(path: Path, config: Suite) -> dict[str, str]:
    """Return a file's predictions by id."""
    rows = json_of(path) if path.suffix == ".json" else json_lines(path)
    if not isinstance(rows, list):
        raise MLLMError(f"{path} holds a {type(rows).__name__}; expected a list of rows with an id and a prediction.")
    keys = config.submission or ()
    predictions: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        name = str(_field(row, (*keys[:1], *_IDS), where, "an id"))
        answer = _field(row, (*keys[1:], *_ANSWERS), where, "a prediction")
        if not isinstance(answer, str):
            kind = "NaN" if isinstance(answer, float) and math.isnan(answer) else type(answer).__name__
            raise MLLMError(f"{where}: the prediction of item {name!r} is {kind}; expected a string.")
        if name in predictions:
            raise MLLMError(f"{where}: item {name!r} is there twice. Expected one prediction for each.")
        predictions[name] = answer
    return predictions


def _field(row: Any, keys: Sequence[str], where: str, what: str) -> Any:
    for key in keys:
        if isinstance(row, dict) and key in row:
            return row[key]
    raise MLLMError(f"{where}: expected {what} under one of the keys {', '.join(dict.fromkeys(keys))}.")


def _summary(folder: Path) -> dict[str, Any]:
    """Return an evaluation's summary, whose values that are read here are there and of their types."""
    summary = json_of(folder / "summary.json")
    label = f"{folder}/summary.json is not an evaluation's summary, or is of an older version"
    checked(_Summary, summary, label=label)
    return dict(summary)


def _variants(summary: Mapping[str, Any]) -> str:
    return ", ".join(f"{entry['name']} v{entry['version']}" for entry in summary["metrics"])
