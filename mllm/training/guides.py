"""Open the guides that a stage asks, and take the connector's width from one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mllm.build import guides_of
from mllm.config.parts import AssemblySpec
from mllm.config.recipe import Stage
from mllm.errors import MLLMError
from mllm.fits.build import fit_of
from mllm.guides.contracts import Ask, AsksGuides, EmbedsImages, FindsProblems, ReadsNoAnswer
from mllm.hub.fingerprints import tensor_hash
from mllm.model import Model
from mllm.objectives.build import objectives_of


def open_guides(model: Model, stage: Stage) -> None:
    """Give a model the guides of a stage, and open those that its objectives or its fit ask.

    Raises:
        MLLMError: a guide that is not there, cannot do what is asked of it, or is the model itself.
    """
    model.guides = guides_of(stage.scorer, stage.guides)
    for ask in asks_of(stage):
        if any(module is model for module in model.guide(ask).modules()):
            raise MLLMError(f"The guide {ask.name or 'scorer'!r} is the model itself, which trains. Give another one.")


def asks_of(stage: Stage) -> list[Ask]:
    """Return what a stage's objectives, or its fit, ask of its guides."""
    return [ask for _, asker in _learners(stage) if isinstance(asker, AsksGuides) for ask in asker.asks]


def problems_of(model: Model, stage: Stage) -> list[str]:
    """Return why a stage's objectives do not suit its model and the guides that are opened."""
    finders = [(name, learner) for name, learner in _learners(stage) if isinstance(learner, FindsProblems)]
    return [f"{name}: {problem}" for name, finder in finders if stage.train for problem in finder.problems(model)]


def check_answers(stage: Stage) -> None:
    """Check that what a stage learns from has answers, where it learns from answers.

    Raises:
        MLLMError: a source has ``unlabeled: true``.
    """
    if not any(source.unlabeled for source in (*stage.data.train, *stage.data.val)):
        return
    for name, learner in _learners(stage):
        if not (isinstance(learner, ReadsNoAnswer) and learner.reads_no_answer):
            raise MLLMError(
                f"Stage {stage.name}: a source has unlabeled: true, and {name} learns from answers. Leave out "
                "'unlabeled', or take what learns from images alone."
            )


def _learners(stage: Stage) -> Sequence[tuple[str, object]]:
    """Return what a stage learns by, with a name for messages."""
    if stage.fit is not None:
        return [(f"the fit of {stage.fit.part}", fit_of(stage))]
    names = [f"the objective {spec.type!r}" for spec in stage.objectives]
    return list(zip(names, objectives_of(stage.objectives), strict=True))


def guide_hashes(guides: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return a hash of all tensors of each guide, by the path under which the run records it."""
    return {f"guides.{name}": tensor_hash(guide) for name, guide in guides.items()}


def assembly_of(stage: Stage) -> AssemblySpec:
    """Return the specification of a stage's model, in which the connector's width is a number.

    Raises:
        MLLMError: the guide that it names is not there, or makes no vectors.
    """
    spec = stage.assembly
    if spec.connector is None or not isinstance(spec.connector.width, str):
        return spec
    name = spec.connector.width
    with torch.device("meta"):
        guide = guides_of(stage.scorer, stage.guides).find(Ask((EmbedsImages,), name))
    return spec.model_copy(update={"connector": spec.connector.model_copy(update={"width": guide.dim})})
