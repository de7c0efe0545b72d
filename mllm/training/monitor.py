"""Log a stage while it trains: its losses, answers to a few prompts, and the scores of suites."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from mllm.assembly import Assembly
from mllm.config.recipe import Stage
from mllm.config.suites import EvalSpec
from mllm.data.items import Item, question_text
from mllm.data.sources import read_all
from mllm.devices import forked_rng
from mllm.evaluation import evaluate
from mllm.prompts.formatting import formatted
from mllm.training.run import Run


@dataclass(frozen=True)
class Monitor:
    """A stage's log, in the run and in its trackers.

    Args:
        run: where rows and reports are written.
        model: what answers.
        stage: which suites, and how often.
        accelerator: has the trackers.
        items: whose answers are shown.
    """

    run: Run
    model: Assembly
    stage: Stage
    accelerator: Accelerator
    items: Sequence[Item]

    def log(self, step: int, measured: Mapping[str, float] | None = None, /, **row: float) -> None:
        """Log the figures of a step; what was ``measured``, and differs from run to run, in a file of its own."""
        self.run.log(stage=self.stage.name, step=step, **row)
        if measured:
            self.run.log_speed(stage=self.stage.name, step=step, **measured)
        figures = {f"{self.stage.name}/{key}": value for key, value in {**row, **(measured or {})}.items()}
        self.accelerator.log(figures, step=step)

    def due(self, step: int) -> bool:
        """Whether to evaluate after a step: every ``eval.every`` steps."""
        return self.stage.eval.every is not None and step % self.stage.eval.every == 0

    def evaluate(self, step: int, show: Callable[[str], None]) -> None:
        """Answer the shown prompts and run the recipe's suites; ``show`` prints a line."""
        self.model.eval()
        with forked_rng():
            for item, answer in answers(self.model, self.items):
                show(f"[dim]step {step}[/dim] {item.id}: {answer}")
                self.run.log(stage=self.stage.name, step=step, item=item.id, answer=answer)
            folder = self.run.path / "eval" / f"{self.stage.name}-{step}"
            for name, value in scores(self.model, self.stage.eval, folder).items():
                show(f"[dim]step {step}[/dim] {name} {value:.3f}")
                self.run.log(stage=self.stage.name, step=step, suite=name, score=value)
                self.accelerator.log({name: value}, step=step)


def shown_items(stage: Stage) -> list[Item]:
    """Return the first validation items, whose answers are shown while training."""
    items = (item for source in read_all(stage.data.val, skip=stage.data.skip) for item in source.items)
    return list(itertools.islice(items, stage.eval.show))


def answers(model: Assembly, items: Sequence[Item]) -> list[tuple[Item, str]]:
    """Return the items that are not conversations, each with the model's answer."""
    asked = [item for item in items if not item.messages]
    prompt = model.spec.prompt
    prompts = [formatted(prompt, item.images, question_text(item, prompt)) for item in asked]
    outputs = [model.generate([one], kind=item.answer_kind)[0] for item, one in zip(asked, prompts, strict=True)]
    return [(item, str(output)) for item, output in zip(asked, outputs, strict=True)]


def scores(model: Assembly, spec: EvalSpec, folder: Path) -> dict[str, float]:
    """Return ``suite/metric`` -> value of each suite's metrics, on its first items; the reports go to a folder."""
    values: dict[str, float] = {}
    for suite in spec.suites:
        name, options = suite.folder, {"overrides": suite.overrides, "baselines": []}
        report = evaluate(model, suite.suite, suite.data, limit=spec.limit, out=folder / name, **options)
        values |= {f"{name}/{entry['name']}": entry["value"] for entry in report.summary["metrics"]}
    return values
