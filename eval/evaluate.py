"""Run a suite: every item answered with its image and by the baselines, scored, compared, written down.

Answers are kept batch by batch as they come (`mllm.eval.journal`), so an evaluation that was killed goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mllm.eval.answers.drawing import BASELINES as DRAWN
from mllm.eval.answers.drawing import decisions, drawings
from mllm.eval.answers.ranking import Ranking
from mllm.eval.answers.ranking import baselines as usual_of
from mllm.eval.answers.text import Answering, closest
from mllm.eval.baselines import USUAL, conditions
from mllm.eval.journal import Journal
from mllm.eval.report import Report, report
from mllm.eval.scoring import OWN, Helpers, Result, measure
from mllm.eval.shots import with_shots
from mllm.eval.suite import Suite, data_hash, load_suite, read_items, read_shots

from mllm.assembly import Assembly
from mllm.config.parts import FROZEN, PromptSpec
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.processes import processes, progress
from mllm.version import __version__


def evaluate(
    model: Assembly,
    suite: str,
    data: str | Path | None = None,
    *,
    limit: int | None = None,
    out: str | Path | None = None,
    baselines: Sequence[str] | None = None,
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
        baselines: of ``blind``, ``shuffled``, ``mean-image``, ``random-connector``; None: the first two. A suite whose
            chooses by the scorer has none; one that ranks has ``shuffled``, and ``blind`` where pictures ask; one that
            draws has ``shuffled``, other items' pictures; one that decides, ``retrieve`` and ``generate``, always.
        run: what the report calls the model.
        overrides: of the suite, dotted: ``["batch_size=8"]``.

    Raises:
        MLLMError: no such suite, its data is not there, or ``out`` holds a part of another evaluation.
    """
    config = load_suite(suite, overrides)
    whole = read_items(config, data)
    if baselines and config.answer == "closest":
        raise MLLMError(f"The suite {config.name} answers with the scorer alone, so it has no baselines.")
    items = with_shots(whole[:limit], read_shots(config, data, whole), config.shots, model)
    usual = {"closest": (), "rank": usual_of(items), **DRAWN}.get(config.answer, USUAL)
    if baselines is None:
        baselines = usual
    elif config.answer in ("rank", *DRAWN) and (wrong := [name for name in baselines if name not in usual]):
        raise MLLMError(f"The suite {config.name} has the baselines {', '.join(usual)}, and no {wrong[0]!r}.")
    state = processes()
    if state.num_processes > 1:
        model.to(state.device)
    about = _about(model, config, items, baselines)
    place = Path(out) if out else None
    journal = Journal(place, about, state.process_index)
    state.wait_for_everyone()
    helpers = Helpers(config.scorer, config.judge, lambda: model.scorer)
    if config.answer == "rank":
        ranking = Ranking(items, helpers.scorer)
        results = {name: Result(ranking.rows(name)) for name in (OWN, *baselines)}
    elif config.answer == "draw":
        made = drawings(model, items, place, baselines, config.batch_size)
        results = {name: Result(paths) for name, paths in made.items()}
    elif config.answer == "decide":
        said = decisions(model, items, baselines, config.batch_size)
        results = {name: Result(labels) for name, labels in said.items()}
    elif config.answer == "closest":
        results = {OWN: Result(closest(items, helpers.scorer, config.calibrate))}
    else:
        results = _results(model, config, items, baselines, journal)
    if not state.is_main_process:
        place = None
    for result in results.values():
        result.scores = {name: measure(name, result.predictions, items, helpers) for name in config.metrics}
    found = report(config, items, results, place, run=run, settings=_settings(model, config, items), about=about)
    state.wait_for_everyone()
    journal.close()
    return found


def _results(
    model: Assembly, config: Suite, items: Sequence[Item], baselines: Sequence[str], journal: Journal
) -> dict[str, Result]:
    """Return the answers of the model and of its baselines."""
    answering = Answering(config, items, journal)
    results = {}
    with progress() as bar:
        for name, condition in conditions(model, items, baselines).items():
            results[name] = Result(answering.answers(condition, name, bar))
    return results


def _about(model: Assembly, config: Suite, items: Sequence[Item], baselines: Sequence[str]) -> dict[str, Any]:
    """Return what decides an evaluation's answers, large things by their hashes."""
    trained = hashlib.sha256()
    for name, tensor in sorted(model.trained_state().items()):
        trained.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return {
        "suite": config.model_dump(mode="json"),
        "data": data_hash(items),
        "shots": data_hash([shot for item in items for shot in item.shots]),
        "baselines": list(baselines),
        "assembly": hashlib.sha256(model.spec.model_dump_json().encode()).hexdigest(),
        **{part: str(getattr(model, part).fingerprint) for part in FROZEN if getattr(model, part) is not None},
        "trained": trained.hexdigest(),
        "mllm": __version__,
    }


def _settings(model: Assembly, config: Suite, items: Sequence[Item]) -> dict[str, Any]:
    prompt: PromptSpec = model.spec.prompt
    return {
        "data": json.dumps({"format": config.data.format, **config.data.options()}),
        "answer": config.answer + (f", calibrated by {config.calibrate}" if config.calibrate else ""),
        "shots": f"{config.shots.count}, {config.shots.select}" if config.shots.count else "none",
        "prompt": prompt.template.replace("{prompt}", prompt.caption if items[0].question is None else prompt.question),
        "decoding": json.dumps({**model.spec.decoding, **config.decoding}),
        "encoder": model.spec.encoder.label if model.spec.encoder else "none",
        "lm": model.spec.lm.model if model.spec.lm else "none",
        "connector": model.spec.connector.type if model.spec.connector else "none",
    }
