"""What an evaluation leaves: a summary, a row an item, the page that shows them, the file that is submitted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm.eval.answers.ranking import shown
from mllm.eval.page import write_page
from mllm.eval.scoring import Result, rows, tally
from mllm.eval.suite import Suite

from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.system import write
from mllm.training.run import environment


@dataclass(frozen=True)
class Report:
    """What an evaluation found: ``summary`` (figures, intervals, settings), ``rows`` (an item each), and its page."""

    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    page: Path | None

    def __getitem__(self, metric: str) -> dict[str, Any]:
        """Return one metric's entry of the summary: value, low, high, baselines."""
        return next(entry for entry in self.summary["metrics"] if entry["name"] == metric)


def report(
    config: Suite,
    items: Sequence[Item],
    results: Mapping[str, Result],
    out: Path | None,
    *,
    run: str,
    settings: Mapping[str, Any],
    about: Mapping[str, Any],
) -> Report:
    """Put scored results together, and write them into ``out`` where it is given.

    The files: ``summary.json``, ``predictions.jsonl``, ``report.html``, and ``submission.json`` for a suite that has
    one.
    """
    summary = {"suite": config.name, "run": run, **tally(config.metrics, items, results)}
    summary |= {"settings": dict(settings), "versions": environment(), "fingerprints": dict(about)}
    lines = rows(items, results)
    if out is None:
        return Report(summary, lines, None)
    try:
        out.mkdir(parents=True, exist_ok=True)
        _text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
        _text(out / "predictions.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        if config.submission:
            _text(out / "submission.json", json.dumps(submission(config.submission, lines)))
        pictures = {item.id: item.images for item in items}
        if config.answer == "rank":
            pictures = {item.id: shown(item, line["prediction"]) for item, line in zip(items, lines, strict=True)}
        return Report(summary, lines, write_page(out, summary, lines, pictures))
    except OSError as error:
        raise MLLMError(f"The report in {out} cannot be written: {error.strerror or error}.") from None


def submission(names: Sequence[str], lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return predictions in the form that an official server takes: ``names`` are the keys of the id and the answer."""
    item, answer = names
    return [
        {item: int(line["id"]) if line["id"].isdecimal() else line["id"], answer: line["prediction"]} for line in lines
    ]


def _text(path: Path, text: str) -> None:
    write(path, lambda file: file.write_text(text))
