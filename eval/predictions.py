"""Answers that are already there: scored from a file, or one evaluation held against another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm.eval.report import Report, report
from mllm.eval.scoring import OWN, Helpers, Result, measure
from mllm.eval.suite import Suite, data_hash, load_suite, read_items

from mllm.config.messages import checked
from mllm.data.files import json_lines, json_of, some
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.version import __version__

_KEYS = ("prediction", "answer", "caption")  # what an answer may stand under
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
            VQA and COCO captions. Every item of the suite stands there once.
        suite, data, limit, out, overrides: as `mllm.eval.evaluate.evaluate` takes them.

    Raises:
        MLLMError: the file is damaged; an item is missing, unknown or there twice; an answer is no text.
    """
    config = load_suite(suite, overrides)
    whole = read_items(config, data)
    items = whole[:limit]
    said = _read(Path(path), config)
    ids = [item.id for item in items]
    unknown, missing = sorted(said.keys() - {i.id for i in whole}), [name for name in ids if name not in said]
    if unknown:
        raise MLLMError(f"{path}: {len(unknown)} ids are not in the suite {config.name}: {some(unknown)}.")
    if missing:
        raise MLLMError(
            f"{path}: {len(missing)} of the suite's {len(ids)} items have no prediction: {some(missing)}. "
            "A part is not scored as the whole."
        )
    results = {OWN: _scored(config, items, [said[name] for name in ids])}
    about = {"suite": config.model_dump(mode="json"), "data": data_hash(items), "mllm": __version__}
    settings = {"predictions": Path(path).name}
    return report(config, items, results, Path(out) if out else None, run=str(path), settings=settings, about=about)


def compare(
    one: str | Path, other: str | Path, data: str | Path | None = None, *, out: str | Path | None = None
) -> Report:
    """Hold one evaluation against another of the same items, paired item by item.

    Args:
        one: an evaluation's folder (``summary.json``, ``predictions.jsonl``).
        other: the folder it is held against; it stands where baselines stand in a report.
        data: the suite's folder, for its pictures in the page and for metrics that look at them.
        out: where the report goes; None: nothing is written.

    Raises:
        MLLMError: the two are not of the same suite, items, metrics and versions of these; a file is damaged.
    """
    mine, theirs = _summary(Path(one)), _summary(Path(other))
    for name, a, b in (
        ("suites", mine["suite"], theirs["suite"]),
        ("items", mine["fingerprints"]["data"], theirs["fingerprints"]["data"]),
        ("metrics", _variants(mine), _variants(theirs)),
    ):
        if a != b:
            raise MLLMError(f"{one} and {other} do not compare: their {name} differ ({a} and {b}).")
    config = checked(Suite, mine["fingerprints"]["suite"], label=f"{one}/summary.json")
    rows = json_lines(Path(one) / "predictions.jsonl")
    pictured = {item.id: item for item in read_items(config, data)} if data or not config.folder else {}
    items = [_item(row, pictured) for row in rows]
    if pictured and data_hash(items) != mine["fingerprints"]["data"]:
        raise MLLMError(f"The data in {data or 'this installation'} is not what {one} was evaluated on.")
    said = [_read(Path(folder) / "predictions.jsonl", config) for folder in (one, other)]
    if said[0].keys() != said[1].keys():
        raise MLLMError(f"{one} and {other} do not compare: their predictions are of different items.")
    label = theirs["run"] or str(other)
    results = {
        name: _scored(config, items, [answers[item.id] for item in items])
        for name, answers in zip((OWN, label), said, strict=True)
    }
    both = mine["settings"].keys() | theirs["settings"].keys()
    pairs = {key: (mine["settings"].get(key), theirs["settings"].get(key)) for key in sorted(both)}
    settings = {key: a if a == b else f"{a} / {b}" for key, (a, b) in pairs.items()}
    about = {"data": mine["fingerprints"]["data"], "one": mine["fingerprints"], "other": theirs["fingerprints"]}
    run = f"{mine['run'] or one} against {label}"
    return report(config, items, results, Path(out) if out else None, run=run, settings=settings, about=about)


def _scored(config: Suite, items: Sequence[Item], predictions: list[str]) -> Result:
    helpers = Helpers(config.scorer, config.judge)
    return Result(predictions, {name: measure(name, predictions, items, helpers) for name in config.metrics})


def _read(path: Path, config: Suite) -> dict[str, str]:
    """Return a file's predictions by id."""
    rows = json_of(path) if path.suffix == ".json" else json_lines(path)
    if not isinstance(rows, list):
        raise MLLMError(f"{path} holds a {type(rows).__name__}; expected a list of rows with an id and a prediction.")
    own = config.submission or ()
    found: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        name = str(_field(row, (*own[:1], *_IDS), where, "an id"))
        answer = _field(row, (*own[1:], *_KEYS), where, "a prediction")
        if not isinstance(answer, str):
            told = "NaN" if isinstance(answer, float) and math.isnan(answer) else type(answer).__name__
            raise MLLMError(f"{where}: the prediction of item {name!r} is {told}; expected a text.")
        if name in found:
            raise MLLMError(f"{where}: item {name!r} is there twice. Expected one prediction for each.")
        found[name] = answer
    return found


def _field(row: Any, keys: Sequence[str], where: str, what: str) -> Any:
    for key in keys:
        if isinstance(row, dict) and key in row:
            return row[key]
    raise MLLMError(f"{where}: expected {what} under one of the keys {', '.join(dict.fromkeys(keys))}.")


def _summary(folder: Path) -> dict[str, Any]:
    summary = json_of(folder / "summary.json")
    if not isinstance(summary, dict) or "data" not in summary.get("fingerprints", {}):
        raise MLLMError(f"{folder}/summary.json is no evaluation's summary, or one of an older version.")
    return summary


def _variants(summary: Mapping[str, Any]) -> str:
    return ", ".join(f"{entry['name']} v{entry['version']}" for entry in summary["metrics"])


def _item(row: Mapping[str, Any], pictured: Mapping[str, Item]) -> Item:
    """Return a row's item: with its pictures where these are at hand, else what the row says of it."""
    if pictured:
        if row["id"] not in pictured:
            raise MLLMError(f"The item {row['id']!r} is not in the data.")
        return pictured[row["id"]]
    return Item(row["id"], (), tuple(row["references"]), row["question"], row["kind"])
