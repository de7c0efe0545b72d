"""Write an evaluation's files: a summary, one row per item, an HTML page that shows both, a submission."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm.eval.answers.base import AnswerMode
from mllm.eval.page import write_page
from mllm.eval.scoring import Result, rows, tally
from mllm.eval.suite import Suite

from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.evaluation import Report
from mllm.registry import lookup
from mllm.system import write
from mllm.training.run import environment


def report(
    config: Suite,
    items: Sequence[Item],
    results: Mapping[str, Result],
    out: Path | None,
    *,
    run: str,
    settings: Mapping[str, Any],
    about: Mapping[str, Any],
    skipped: Mapping[str, str] | None = None,
    words: Mapping[str, str] | None = None,
) -> Report:
    """Return the report of scored results, written into ``out`` if that is given; ``skipped``: error by item's id.

    The files: ``summary.json``, ``predictions.jsonl``, ``report.html``, and ``submission.json`` for a suite that has
    one. ``words``: the words of items' images, by the items' ids.
    """
    summary = {"suite": config.name, "run": run, **tally(config.metrics, items, results)}
    if skipped:
        summary["skipped"] = {"n": len(skipped), "items": dict(skipped)}
    summary |= {"settings": dict(settings), "versions": environment(), "fingerprints": dict(about)}
    lines = rows(items, results, words)
    if out is None:
        return Report(summary, lines, None)
    mode: AnswerMode = lookup("answers", config.answer)()
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write(out / "summary.json", json.dumps(summary, indent=2) + "\n")
        _write(out / "predictions.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        if config.submission:
            _write(out / "submission.json", json.dumps(submission(config.submission, lines)))
        images = {item.id: mode.shown_images(item, line["prediction"]) for item, line in zip(items, lines, strict=True)}
        return Report(summary, lines, write_page(out, summary, lines, images))
    except OSError as error:
        raise MLLMError(f"The report in {out} cannot be written: {error.strerror or error}.") from None


def submission(names: Sequence[str], lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return predictions in the format of an official server: ``names`` are the keys of the id and of the answer."""
    item, answer = names
    return [
        {item: int(line["id"]) if line["id"].isdecimal() else line["id"], answer: line["prediction"]} for line in lines
    ]


def _write(path: Path, text: str) -> None:
    write(path, lambda file: file.write_text(text))
