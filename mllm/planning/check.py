"""Find everything that does not fit in a recipe before a weight is loaded.

Notable: the parts are built on torch's meta device, from their configurations, by the code that builds them for
training; so a problem that is reported here is one that training would have met.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mllm.answering.decode import make_decoding
from mllm.assembly import Assembly
from mllm.capabilities import SEVERAL, ImageTokenHead, missing
from mllm.config import loading
from mllm.config.data import DataSpec
from mllm.config.parts import KINDS, PARTS
from mllm.config.recipe import Recipe, Stage
from mllm.data.sources import reader
from mllm.errors import MLLMError
from mllm.evaluation import check_suite
from mllm.fits.build import fit_of
from mllm.lms.decoding import check_batch
from mllm.objectives.build import objectives_of
from mllm.parts import trained_module
from mllm.planning.needs import planned_needs
from mllm.planning.paper import assembled, noted
from mllm.prompts.chat_template import uses_template
from mllm.prompts.entities import vocabulary_of
from mllm.readout.tokens import image_tokens
from mllm.training.batches import check_augmentation
from mllm.training.guides import check_answers, open_guides, problems_of
from mllm.training.texts import check_texts
from mllm.transfer import check_source


def problems(recipe: str, overrides: Mapping[str, Any] | Sequence[str] = ()) -> list[str]:
    """Return every problem of a recipe, in one or two sentences each; an empty list where there is none.

    A run that it needs and that is not there yet is no problem if the recipe that trains it has none.
    """
    wrong: list[str] = []
    with noted(wrong):
        config = loading.load(recipe, overrides)
        with planned_needs(config) as needs:
            for need in needs:
                those = _of_recipe(loading.load(need.recipe))
                wrong += [f"The recipe {need.recipe}, which {config.name} needs: {problem}" for problem in those]
            wrong += _of_recipe(config)
    return wrong


def _of_recipe(config: Recipe) -> list[str]:
    """Return the problems of a recipe alone."""
    wrong: list[str] = []
    built: dict[str, Assembly | None] = {}
    for stage in config.stages:
        wrong += [problem for problem in _of_stage(stage, built) if problem not in wrong]
    for suite in config.eval.suites:
        with noted(wrong):
            check_suite(suite.suite, suite.overrides)
    if not config.stages:
        wrong.append(f"{config.name} has no stages: there is nothing to train.")
    return wrong


def _of_stage(stage: Stage, built: dict[str, Assembly | None]) -> list[str]:
    """Return a stage's problems; ``built`` keeps models by their parts, since stages mostly share them."""
    wrong: list[str] = []
    with noted(wrong):
        objectives_of(stage.objectives)
    for source in (*stage.data.train, *stage.data.val):
        with noted(wrong):
            _check_data(source)
    if not stage.data.train and not (stage.fit and stage.fit.targets == "tokens"):
        wrong.append(f"Stage {stage.name} has no data: give data.train.")
    parts = " ".join(repr(getattr(stage, part)) for part in PARTS)
    if parts not in built:
        built[parts] = assembled(stage, wrong)
    model = built[parts]
    if model is not None:
        wrong += _of_model(model, stage)
    return wrong


def _of_model(model: Assembly, stage: Stage) -> list[str]:
    """Return what a stage's model lacks for what the stage does with it."""
    wrong: list[str] = []
    for path in stage.train:
        with noted(wrong):
            trained_module(model, path)
    with noted(wrong):
        if stage.prompt.entities is not None:
            vocabulary_of(stage.prompt.entities)
    wrong += [f"Stage {stage.name}: {problem}" for problem in unmet(model, stage)]
    with noted(wrong):
        check_answers(stage)
    with noted(wrong):
        with torch.device("meta"):
            open_guides(model, stage)
        wrong += [f"Stage {stage.name}: {problem}" for problem in problems_of(model, stage)]
    with noted(wrong):
        if stage.fit is not None:
            wrong += [f"Stage {stage.name} {problem}" for problem in fit_of(stage).problems(model)]
    with noted(wrong):
        if stage.init.source is not None:
            check_source(model, stage)
    with noted(wrong):
        check_augmentation(stage, model)
    with noted(wrong):
        check_texts(stage, model)
    with noted(wrong):
        if model.has(ImageTokenHead):
            image_tokens(model)
    with noted(wrong):
        for kind in (None, *KINDS):
            check_batch([make_decoding(model, {"kind": kind})])
    if model.generates_text and model.connector is not None and model.lm.tokenizer is not None:  # text has a length
        with noted(wrong):
            _ = model.lm.eos
        with noted(wrong):
            uses_template(stage.prompt, model.lm)
        with noted(wrong):
            _check_length(model, stage)
    return wrong


def _check_length(model: Assembly, stage: Stage) -> None:
    """Check that an image, the prompt and the answer fit into the language model's context."""
    length = model.tokens_per_image + len(model.lm.tokenize(stage.prompt.question))
    length += stage.longest_answer
    most = "" if isinstance(model.counts, int) else "up to "
    if model.lm.context is not None and length > model.lm.context:
        raise MLLMError(
            f"One image ({most}{model.tokens_per_image} tokens), the prompt and the answer take {length} tokens, and "
            f"the language model was made for {model.lm.context}. Set connector.tokens lower, or take another one."
        )


def unmet(model: Assembly, stage: Stage) -> list[str]:
    """Return what a stage's objectives need and the model does not have."""
    if not stage.train:
        return []
    lacking = []
    for spec, objective in zip(stage.objectives, objectives_of(stage.objectives), strict=True):
        for kind in objective.needs:
            parts: dict[str, object] = model.find_all(kind)
            if not parts:
                lacking.append(f"the objective {spec.type!r} needs {missing(kind)}.")
            elif len(parts) > 1 and kind not in SEVERAL:
                lacking.append(f"the objective {spec.type!r} takes one of {', '.join(parts)}. Keep one of them.")
    return lacking


def _check_data(spec: DataSpec) -> None:
    """Check a source's arguments against its reader, and that the files it names exist."""
    reader(spec)
    for key in ("annotations", "path", *(["images"] if spec.see == "image" else [])):
        path = spec.options().get(key)
        pattern = "{" in str(path)  # of several files, which the reader looks for
        if path is not None and not pattern and not os.path.exists(path):
            raise MLLMError(f"data: {key} is {path!r}, and there is no such file or folder.")
