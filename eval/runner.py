"""Run a suite: every item answered with its image and by the baselines, scored, compared, written down.

Answers are kept batch by batch as they come (`mllm.eval.journal`), so an evaluation that was killed goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mllm.eval.baselines import USUAL, Condition, conditions
from mllm.eval.journal import Journal
from mllm.eval.report import Report, report
from mllm.eval.scoring import Helpers, Result, measure
from mllm.eval.suite import Suite, data_hash, load_suite, read_items

from mllm.data.items import Item, question_text
from mllm.errors import MLLMError
from mllm.model import Assembly
from mllm.prompt import arrange
from mllm.spec import PromptSpec
from mllm.training import progress
from mllm.version import __version__
from mllm.view import View


def evaluate(
    model: Assembly,
    suite: str,
    data: str | Path | None = None,
    *,
    limit: int | None = None,
    out: str | Path | None = None,
    baselines: Sequence[str] = USUAL,
    run: str = "",
    overrides: Sequence[str] = (),
) -> Report:
    """Run a suite on a model and its baselines.

    Args:
        model: the assembly.
        suite: a suite's name, or the path of its YAML file.
        data: the folder the suite's files are in, for suites whose data is not embedded.
        limit: the first items only.
        out: a folder for ``report.html``, ``summary.json`` and ``predictions.jsonl``; None: nothing is written.
            An evaluation that was killed goes on there, and ends with the same files.
        baselines: of ``blind``, ``shuffled``, ``mean-image``, ``random-connector``.
        run: what the report calls the model.
        overrides: of the suite, dotted: ``["batch_size=8"]``.

    Raises:
        MLLMError: no such suite, its data is not there, or ``out`` holds a part of another evaluation.
    """
    config = load_suite(suite, overrides)
    items = read_items(config.data, config.folder, data, config.name)[:limit]
    about = _about(model, config, items, baselines)
    journal = Journal(Path(out) if out else None, about)
    results = {}
    known: dict[Any, Any] = {}  # what was put to the model, in any condition
    with progress() as bar:
        for name, condition in conditions(model, items, baselines).items():
            task = bar.add_task(name, total=len(items), note="")
            advance = lambda n, task=task: bar.update(task, advance=n)  # noqa: E731
            if condition.model is not model:
                known = {}
            results[name] = Result(_answers(condition, name, config, items, known, journal, advance))
    helpers = Helpers(config.scorer, config.judge, lambda: model.scorer)
    for result in results.values():
        result.scores = {name: measure(name, result.predictions, items, helpers) for name in config.metrics}
    settings = _settings(model, config, items)
    found = report(config, items, results, Path(out) if out else None, run=run, settings=settings, about=about)
    journal.close()
    return found


def _about(model: Assembly, config: Suite, items: Sequence[Item], baselines: Sequence[str]) -> dict[str, Any]:
    """Return what decides an evaluation's answers, large things by their hashes."""
    trained = hashlib.sha256()
    for name, tensor in sorted(model.trained_state().items()):
        trained.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return {
        "suite": config.model_dump(mode="json"),
        "data": data_hash(items),
        "baselines": list(baselines),
        "assembly": hashlib.sha256(model.spec.model_dump_json().encode()).hexdigest(),
        "encoder": str(model.encoder.fingerprint),
        "lm": str(model.lm.fingerprint),
        "trained": trained.hexdigest(),
        "mllm": __version__,
    }


def _answers(
    condition: Condition,
    name: str,
    config: Suite,
    items: Sequence[Item],
    known: dict[Any, Any],
    journal: Journal,
    advance: Callable[[int], None],
) -> list[str]:
    """Answer all items. What was put before, with these images, is in ``known`` and is not put again."""
    model, prompt = condition.model, condition.model.spec.prompt
    keys = [(condition.images(index), question_text(item, prompt), item.choices) for index, item in enumerate(items)]
    order = list({key: None for key in keys if key not in known})
    advance(len(items) - len(order))
    for number, batch in enumerate(_batches(model, config, order)):
        own = [key for _, texts in batch for key in texts.values()]
        # Batches are made the same way when an evaluation goes on, so that its answers are the same to the last bit.
        answers = journal.get(f"{name}/{number}")
        if answers is None:
            answers = _answered(model, config, batch)
            _finite(answers, own, items, keys)
            journal.put(f"{name}/{number}", answers)
        known.update(zip(own, answers, strict=True))
        advance(len(own))
    found = [known[key] for key in keys]
    return chosen(found, config.calibrate) if config.answer == "choose" else found


def _answered(model: Assembly, config: Suite, batch: Sequence[tuple[list[Any], dict[str, Any]]]) -> list[Any]:
    """Return a batch's answers, or each choice's log-likelihood, in the order of its texts."""
    views = model.see_each([prompt for prompt, _ in batch])
    if config.answer == "generate":
        return list(chain(*views.go_on([list(own) for _, own in batch], **config.decoding)))
    pairs = zip(batch, views, strict=True)
    return [_scores(view, key[2]) for (_, own), view in pairs for key in own.values()]


def _finite(answers: Sequence[Any], own: Sequence[Any], items: Sequence[Item], keys: Sequence[Any]) -> None:
    """Refuse scores that are no numbers: the greatest of them would be a word of chance."""
    for answer, key in zip(answers, own, strict=True):
        if isinstance(answer, dict) and not all(math.isfinite(score) for score in answer.values()):
            item = items[keys.index(key)].id
            raise MLLMError(f"Item {item!r}: a choice's log-likelihood is not finite. Did training diverge?")


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


def _settings(model: Assembly, config: Suite, items: Sequence[Item]) -> dict[str, Any]:
    prompt: PromptSpec = model.spec.prompt
    return {
        "data": json.dumps({"format": config.data.format, **config.data.options()}),
        "answer": config.answer + (f", calibrated by {config.calibrate}" if config.calibrate else ""),
        "prompt": prompt.template.replace("{prompt}", prompt.caption if items[0].question is None else prompt.question),
        "decoding": json.dumps({**model.spec.decoding, **config.decoding}),
        "encoder": model.spec.encoder.model,
        "lm": model.spec.lm.model,
        "connector": model.spec.connector.type,
    }
