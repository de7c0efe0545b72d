"""What is looked at while a model trains: answers to a few prompts, and suites."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm.config.recipe import EvalSpec
from mllm.data.items import Item, question_text
from mllm.evaluation import evaluate
from mllm.prompts.pieces import arrange


def answers(model: Any, items: Sequence[Item]) -> list[tuple[Item, str]]:
    """Return what a model says to items now."""
    asked = [item for item in items if not item.messages]
    prompt = model.spec.prompt
    prompts = [arrange(prompt.template, item.images, question_text(item, prompt)) for item in asked]
    found = model.generate(prompts) if prompts else []
    return [(item, str(answer)) for item, answer in zip(asked, found, strict=True)]


def scores(model: Any, spec: EvalSpec, folder: Path) -> dict[str, float]:
    """Return ``suite/metric`` -> value of each suite's metrics, on its first items; the reports go to a folder."""
    found: dict[str, float] = {}
    for suite in spec.suites:
        report = evaluate(model, suite, limit=spec.limit, out=folder / suite, baselines=[])
        found |= {f"{suite}/{entry['name']}": entry["value"] for entry in report.summary["metrics"]}
    return found
