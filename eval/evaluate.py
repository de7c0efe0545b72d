"""Run a suite: answer every item under each condition, score and compare the answers, write the report.

Answers are kept batch by batch as they come (`mllm.eval.journal`), so an evaluation that was killed continues.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mllm.eval.answers.base import AnswerMode, Context
from mllm.eval.fitting import that_fit, that_fit_with_others
from mllm.eval.journal import Journal, locked
from mllm.eval.nearest import NEAREST, training_items
from mllm.eval.report import report
from mllm.eval.scoring import Helpers, Result, measure
from mllm.eval.shots import with_shots
from mllm.eval.suite import Suite, data_hash, load_suite, read_items, read_shots

from mllm.assembly import Assembly
from mllm.capabilities import RemembersTexts, SpeaksWords
from mllm.config.parts import FROZEN
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.evaluation import Report
from mllm.processes import processes
from mllm.readout.words import readable
from mllm.registry import lookup
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
        data: the folder of the suite's files, for suites whose data is not embedded.
        limit: the first items only.
        out: a folder for ``report.html``, ``summary.json`` and ``predictions.jsonl``; None: nothing is written.
            An evaluation that was killed continues there, and ends with the same files.
        baselines: their names, of those that the suite's answer mode offers; ``["all"]``: all of them; None: those
            that are usual. Modes with prompts offer ``blind`` and ``shuffled`` (both usual), ``mean-image`` and
            ``random-connector``; ``generate`` also ``nearest``, the answer of the nearest training image (usual for a
            run whose data is there); ``rank`` offers ``shuffled``, and ``blind`` where prompts have images; ``draw``
            offers ``shuffled``; ``decide`` offers ``retrieve`` and ``generate``, always the same label; ``closest``
            offers none.
        run: the model's name in the report.
        overrides: of the suite, dotted: ``["batch_size=8"]``.

    Items that do not fit into the language model's context, their answer included, are skipped: left out of the
    scores, and listed under ``skipped`` in the summary. So are those that do not with a baseline's image.

    Raises:
        MLLMError: an unknown suite or baseline, data that is missing or does not fit the suite's answer mode, or an
            ``out`` with a part of another evaluation, or in which another process writes.
    """
    config = load_suite(suite, overrides)
    all_items = read_items(config, data)
    items = with_shots(all_items[:limit], read_shots(config, data, all_items), config.shots, model)
    mode: AnswerMode = lookup("answers", config.answer)()
    items, skipped = that_fit(mode, model, items, Context(config))
    names = _baselines(config, mode.baselines(items), baselines)
    items, more = that_fit_with_others(mode, model, items, Context(config, names))
    skipped |= more
    names, training = _with_training(model, names, asked=NEAREST in (baselines or ()))
    state = processes()
    about = _about(model, config, items, names)
    folder = Path(out) if out else None
    with locked(folder):
        journal = Journal(folder, about, state.process_index)
        state.wait_for_everyone()
        helpers = Helpers(config.scorer, config.judge, lambda: model.scorer, model.device)
        answers = mode.answers(model, items, Context(config, names, training, folder, journal, helpers))
        results = {name: Result(texts, _scores(config, texts, items, helpers)) for name, texts in answers.items()}
        facts = {"settings": _settings(model, config, items), "about": about, "words": words_of(model, items)}
        written = folder if state.is_main_process else None
        made = report(config, items, results, written, run=run, skipped=skipped, **facts)
        state.wait_for_everyone()
        journal.close()
    return made


def _baselines(config: Suite, offered: Mapping[str, bool], wanted: Sequence[str] | None) -> list[str]:
    """Return the names of the baselines to evaluate."""
    if wanted is None:
        return [name for name, usual in offered.items() if usual]
    if list(wanted) == ["all"]:
        return list(offered)
    for name in wanted:
        if not offered:
            raise MLLMError(f"The suite {config.name} has no baselines (answer={config.answer}), so none {name!r}.")
        if name not in offered:
            raise MLLMError(f"The suite {config.name} has the baselines {', '.join(offered)}, and no {name!r}.")
    return list(wanted)


def _with_training(model: Assembly, names: list[str], *, asked: bool) -> tuple[list[str], Sequence[Item]]:
    """Return the baselines, and the training items for ``nearest``; without them it is left out unless asked for.

    Raises:
        MLLMError: the baseline was asked for, and the model's training data is not there.
    """
    if NEAREST not in names:
        return names, ()
    items: Sequence[Item] = ()
    try:
        items = training_items(model)
        if asked and not items:
            raise MLLMError("it needs a run that was trained on captions or questions about images.")
    except MLLMError as error:
        if asked:
            raise MLLMError(f"The baseline {NEAREST!r} is not available: {error}") from None
        warnings.warn(f"Evaluated without the baseline {NEAREST!r}: {error}", stacklevel=3)
    return (names if items else [name for name in names if name != NEAREST]), items


def _scores(config: Suite, answers: list[str], items: Sequence[Item], helpers: Helpers) -> dict[str, Any]:
    return {name: measure(name, answers, items, helpers) for name in config.metrics}


def _about(model: Assembly, config: Suite, items: Sequence[Item], baselines: Sequence[str]) -> dict[str, Any]:
    """Return what determines an evaluation's answers, large things by their hashes."""
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


def words_of(model: Assembly, items: Sequence[Item]) -> dict[str, str]:
    """Return the words of items' images by the items' ids, for a model whose connector answers in words."""
    if not isinstance(model.connector, SpeaksWords | RemembersTexts):
        return {}
    images = {image.key(): image for item in items for image in item.images}
    words = dict(zip(images, map(readable, model.words(list(images.values()))), strict=True))
    return {item.id: " | ".join(words[image.key()] for image in item.images) for item in items if item.images}


def _settings(model: Assembly, config: Suite, items: Sequence[Item]) -> dict[str, str]:
    """Return what the report says about how the model was evaluated."""
    prompt = model.spec.prompt
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
