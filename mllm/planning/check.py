"""Find what does not fit in a recipe, all of it, before a weight is loaded.

Notable: the parts are built on torch's meta device, from their configurations, by the same code that builds them for
training; so what is found here is what training would have run into.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm.assembly import Assembly
from mllm.build import fit_of, objectives_of
from mllm.capabilities import ImageTokenHead, missing
from mllm.config import loading as recipes
from mllm.config.data import DataSpec
from mllm.config.parts import PARTS
from mllm.config.recipe import Recipe, Stage
from mllm.data.sources import reader
from mllm.errors import MLLMError
from mllm.model import trained_module
from mllm.planning.paper import assembled, noted
from mllm.readout.tokens import image_tokens
from mllm.transfer import check_source


def problems(recipe: str, overrides: Mapping[str, Any] | Sequence[str] = ()) -> list[str]:
    """Return every problem of a recipe, one sentence or two each; an empty list where there is none."""
    found: list[str] = []
    built: dict[str, Assembly | None] = {}
    with noted(found):
        config = recipes.load(recipe, overrides)
        for stage in config.stages:
            found += [problem for problem in _of_stage(stage, config, built) if problem not in found]
        if not config.stages:
            found.append(f"{config.name} has no stages: there is nothing to train.")
    return found


def _of_stage(stage: Stage, config: Recipe, built: dict[str, Assembly | None]) -> list[str]:
    """Return a stage's problems; ``built`` keeps models by their parts, since stages mostly share them."""
    found: list[str] = []
    with noted(found):
        objectives_of(stage.objectives)
    for source in (*stage.data.train, *stage.data.val):
        with noted(found):
            _check_source(source)
    if not stage.data.train and not (stage.fit and stage.fit.targets == "tokens"):
        found.append(f"Stage {stage.name} has no data: give data.train.")
    parts = " ".join(repr(getattr(stage, part)) for part in PARTS)
    if parts not in built:
        built[parts] = assembled(stage, config, found)
    model = built[parts]
    if model is not None:
        found += _of_model(model, stage)
    return found


def _of_model(model: Assembly, stage: Stage) -> list[str]:
    found: list[str] = []
    connector: Any = model.connector
    lm: Any = model.lm
    for path in stage.train:
        with noted(found):
            trained_module(model, path)
    found += [f"Stage {stage.name}: {problem}" for problem in unmet(model, stage)]
    with noted(found):
        if stage.fit is not None:
            found += [f"Stage {stage.name} {problem}" for problem in fit_of(stage).problems(model)]
    with noted(found):
        if stage.init.source is not None:
            check_source(model, stage)
    with noted(found):
        if model.has(ImageTokenHead):
            image_tokens(model)
    if (
        not model.generates_text or connector is None or lm.tokenizer is None
    ):  # only its configuration is here: the words cannot be counted
        return found
    with noted(found):
        _ = lm.eos
    length = model.tokens_per_image + len(lm.tokenize(stage.prompt.question))
    length += int(stage.decoding.get("max_new_tokens", 20))
    if lm.context is not None and length > lm.context:
        found.append(
            f"One image ({model.tokens_per_image} tokens), the prompt and the answer take {length} positions, and the "
            f"language model was made for {lm.context}. Set connector.tokens lower, or take another one."
        )
    return found


def unmet(model: Assembly, stage: Stage) -> list[str]:
    """Return what a stage's objectives need and the model has not."""
    if not stage.train:
        return []
    found = []
    for spec, objective in zip(stage.objectives, objectives_of(stage.objectives), strict=True):
        for kind in objective.needs:
            if not model.has(kind):
                found.append(f"the objective {spec.type!r} needs {missing(kind)}.")
    return found


def _check_source(spec: DataSpec) -> None:
    """Hold a source's arguments against its reader, and see that the files it names are there."""
    reader(spec)
    for key in ("annotations", "path", "images"):
        place = spec.options().get(key)
        pattern = "{" in str(place)  # of several files, which the reader looks for
        if place is not None and not pattern and not Path(place).exists():
            raise MLLMError(f"data: {key} is {place!r}, and there is no such file or folder.")
