"""Run a suite: every item answered with its image and by the baselines, scored, compared, written down.

Baselines: ``blind`` sees no image, ``shuffled`` sees another item's. A score without them says little: a language model
alone answers many questions.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
from mllm.eval.report import write_report
from omegaconf import OmegaConf
from pydantic import Field

from mllm.data.items import Item, question_text
from mllm.data.loading import read
from mllm.errors import MLLMError, near
from mllm.files import write
from mllm.images import ImageSource
from mllm.model import Assembly
from mllm.prompt import arrange
from mllm.registry import lookup
from mllm.run import environment
from mllm.spec import DataSpec, PromptSpec, Spec, checked
from mllm.training import progress
from mllm.view import View

RESAMPLES = 2000
BASELINES = ("blind", "shuffled")


class Suite(Spec):
    """One suite: which data, how it is put, what is measured."""

    name: str
    about: str
    data: DataSpec
    folder: dict[str, str] = Field({})  # reader's argument -> file or folder inside --data
    metrics: list[str]
    answer: Literal["generate", "choose"] = "generate"  # choose: the most likely of the item's choices
    calibrate: float = Field(0.0, ge=0, le=1)  # of choices: the share of their mean score over all items taken off
    decoding: dict[str, Any] = Field({})
    batch_size: int = 32


@dataclass
class Result:
    """One condition's predictions, and their scores by metric."""

    predictions: list[str]
    scores: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What an evaluation found: ``summary`` (figures, intervals, settings), ``rows`` (an item each), and its page."""

    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    page: Path | None

    def __getitem__(self, metric: str) -> dict[str, Any]:
        """Return one metric's entry of the summary: value, low, high, baselines."""
        return next(entry for entry in self.summary["metrics"] if entry["name"] == metric)


def load_suite(name: str) -> Suite:
    """Return a suite by its name.

    Raises:
        MLLMError: no suite has that name.
    """
    known = suite_names()
    if name not in known:
        raise MLLMError(f"No suite is called {name!r}. {near(name, known)}")
    text = (files("mllm.eval") / "suites" / f"{name}.yaml").read_text()
    return checked(Suite, OmegaConf.to_container(OmegaConf.create(text)), label=f"Suite {name}")


def suite_names() -> list[str]:
    """Return the names of the suites that come with the package."""
    return sorted(
        Path(entry.name).stem for entry in (files("mllm.eval") / "suites").iterdir() if entry.name.endswith(".yaml")
    )


def evaluate(
    model: Assembly,
    suite: str,
    data: str | Path | None = None,
    *,
    limit: int | None = None,
    out: str | Path | None = None,
    baselines: Sequence[str] = BASELINES,
    run: str = "",
) -> Report:
    """Run a suite on a model and its baselines.

    Args:
        model: the assembly.
        suite: a suite's name.
        data: the folder the suite's files are in, for suites whose data is not embedded.
        limit: the first items only.
        out: a folder for ``report.html``, ``summary.json`` and ``predictions.jsonl``; None: nothing is written.
        baselines: of ``blind``, ``shuffled``.
        run: what the report calls the model.

    Raises:
        MLLMError: no such suite, or its data is not there.
    """
    config = load_suite(suite)
    items = _items(config, data)[:limit]
    conditions = {"model": lambda i: items[i].images, **{name: _condition(name, items) for name in baselines}}
    results = {}
    known: dict[Any, Any] = {}  # what was put to the model, in any condition
    with progress() as bar:
        for name, images in conditions.items():
            task = bar.add_task(name, total=len(items), note="")
            advance = lambda n, task=task: bar.update(task, advance=n)  # noqa: E731
            results[name] = Result(_answers(model, config, items, images, known, advance))
    for result in results.values():
        result.scores = {
            metric: lookup("metrics", metric)(result.predictions, [item.answers for item in items])
            for metric in config.metrics
        }
    summary = _summary(model, config, items, results, run)
    rows = [_row(index, item, results) for index, item in enumerate(items)]
    return Report(summary, rows, _write(Path(out), summary, rows, items) if out else None)


def _items(config: Suite, data: str | Path | None) -> list[Item]:
    options = config.data.options()
    if config.folder:
        if data is None:
            wanted = ", ".join(config.folder.values())
            raise MLLMError(f"The suite {config.name} needs --data DIR, a folder with {wanted}.")
        options.update({name: str(Path(data) / place) for name, place in config.folder.items()})
    return read(DataSpec(format=config.data.format, **options))


def _condition(name: str, items: Sequence[Item]) -> Callable[[int], tuple[ImageSource, ...]]:
    """Return what an item's images are replaced by."""
    if name == "blind":
        return lambda index: ()
    if name == "shuffled":
        partner = _derangement(items)
        return lambda index: items[partner[index]].images
    raise MLLMError(f"No baseline is called {name!r}. {near(name, BASELINES)}")


def _derangement(items: Sequence[Item]) -> list[int]:
    """Give each item another item, with another image, in an order fixed by a seed."""
    order = list(range(len(items)))
    Random(0).shuffle(order)
    partner = [0] * len(items)
    for place, index in enumerate(order):
        others = (order[(place + step) % len(order)] for step in range(1, len(order)))
        partner[index] = next((other for other in others if items[other].images != items[index].images), index)
    if len(items) > 1 and partner == list(range(len(items))):
        raise MLLMError("The baseline 'shuffled' needs items with different images.")
    return partner


def _answers(
    model: Assembly,
    config: Suite,
    items: Sequence[Item],
    images: Callable[[int], tuple[ImageSource, ...]],
    known: dict[Any, Any],
    advance: Callable[[int], None],
) -> list[str]:
    """Answer all items. What was put before, with these images, is in ``known`` and is not put again."""
    keys = [(images(index), question_text(item, model.spec.prompt), item.choices) for index, item in enumerate(items)]
    order = list({key: None for key in keys if key not in known})
    advance(len(items) - len(order))
    for batch in _batches(model, config, order):
        views = model.see_each([prompt for prompt, _ in batch])
        if config.answer == "choose":
            for (_, own), view in zip(batch, views, strict=True):
                known.update({key: _scores(view, key[2]) for key in own.values()})
        else:
            answers = views.go_on([list(own) for _, own in batch], **config.decoding)
            known.update(zip(chain(*(own.values() for _, own in batch)), chain(*answers), strict=True))
        advance(sum(len(own) for _, own in batch))
    found = [known[key] for key in keys]
    return chosen(found, config.calibrate) if config.answer == "choose" else found


def _batches(model: Assembly, config: Suite, keys: Sequence[Any]) -> Iterator[list[tuple[list[Any], dict[str, Any]]]]:
    """Yield prompts, each with the texts that follow it (text -> key), some ``batch_size`` texts at a time.

    Images are one prompt for all that is asked about them. A question without images, or whose answers are scored, is
    a prompt itself, with nothing to follow.
    """
    template, shared = model.spec.prompt.template, config.answer == "generate"
    prompts: dict[Any, tuple[list[Any], dict[str, Any]]] = {}
    for key in keys:
        images, text, _ = key
        if images and shared:
            prompts.setdefault(images, (arrange(template, images), {}))[1][text] = key
        else:
            prompts[key] = (arrange(template, images, text), {"": key})
    batch: list[tuple[list[Any], dict[str, Any]]] = []
    for prompt in prompts.values():
        batch.append(prompt)
        if sum(len(own) for _, own in batch) >= config.batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _scores(view: View, choices: Sequence[str]) -> dict[str, float]:
    if not choices:
        raise MLLMError("This suite chooses among given answers, and the data has none.")
    return dict(zip(choices, view.score(choices), strict=True))


def chosen(scores: Sequence[dict[str, float]], calibrate: float) -> list[str]:
    """Return each item's most likely answer, less a share of the answer's mean score over all items.

    An answer that is likely whatever is seen says little about what is seen. This is batch calibration
    (arXiv:2309.17249; there the share is 1). It needs the items together, and none of their references.
    """
    by_answer: dict[str, list[float]] = defaultdict(list)
    for row in scores:
        for answer, score in row.items():
            by_answer[answer].append(score)
    prior = {answer: calibrate * float(np.mean(values)) for answer, values in by_answer.items()}
    return [max(row, key=lambda answer: row[answer] - prior[answer]) for row in scores]


def _summary(
    model: Assembly, config: Suite, items: Sequence[Item], results: Mapping[str, Result], run: str
) -> dict[str, Any]:
    prompt: PromptSpec = model.spec.prompt
    return {
        "suite": config.name,
        "run": run,
        "n": len(items),
        "settings": {
            "data": json.dumps({"format": config.data.format, **config.data.options()}),
            "answer": config.answer + (f", calibrated by {config.calibrate}" if config.calibrate else ""),
            "prompt": prompt.template.replace(
                "{prompt}", prompt.caption if items[0].question is None else prompt.question
            ),
            "decoding": json.dumps({**model.spec.decoding, **config.decoding}),
            "encoder": model.spec.encoder.model,
            "lm": model.spec.lm.model,
            "connector": model.spec.connector.type,
        },
        "versions": environment(),
        "baselines": [name for name in results if name != "model"],
        "metrics": [_entry(name, results) for name in config.metrics],
        "kinds": _kinds(items, results["model"]),
    }


def _entry(metric: str, results: Mapping[str, Result]) -> dict[str, Any]:
    score = results["model"].scores[metric]
    values = np.asarray(score.per_item)
    averages = np.isclose(values.mean(), score.value)  # BLEU is no mean over items: it has no interval here
    low, high = interval(values) if averages else (None, None)
    entry: dict[str, Any] = {"name": metric, "version": score.version, "value": score.value, "low": low, "high": high}
    entry["baselines"] = {}
    for name, result in results.items():
        if name == "model":
            continue
        other = result.scores[metric]
        low, high = interval(values - np.asarray(other.per_item)) if averages else (None, None)
        gain = score.value - other.value
        entry["baselines"][name] = {"value": other.value, "gain": gain, "low": low, "high": high}
    return entry


def interval(values: Any, *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of ``values (N,)``; paired, where they are differences."""
    draw = np.random.default_rng(seed)
    means = [float(values[draw.integers(0, len(values), len(values))].mean()) for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _kinds(items: Sequence[Item], result: Result) -> dict[str, dict[str, float]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        groups[item.kind or "all"].append(index)
    return {
        kind: {"n": len(members)}
        | {name: float(np.mean([score.per_item[i] for i in members])) for name, score in result.scores.items()}
        for kind, members in sorted(groups.items())
    }


def _row(index: int, item: Item, results: Mapping[str, Result]) -> dict[str, Any]:
    return {
        "id": item.id,
        "kind": item.kind,
        "question": item.question,
        "references": list(item.answers),
        "prediction": results["model"].predictions[index],
        "baselines": {name: result.predictions[index] for name, result in results.items() if name != "model"},
        "scores": {name: score.per_item[index] for name, score in results["model"].scores.items()},
    }


def _write(folder: Path, summary: dict[str, Any], rows: list[dict[str, Any]], items: Sequence[Item]) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "summary.json", lambda file: file.write_text(json.dumps(summary, indent=2) + "\n"))
        write(
            folder / "predictions.jsonl", lambda file: file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        )
        return write_report(folder, summary, rows, {item.id: item.images for item in items})
    except OSError as error:
        raise MLLMError(f"The report in {folder} cannot be written: {error.strerror or error}.") from None
