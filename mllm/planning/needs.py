"""Check and plan a recipe before the runs that it needs are trained: their models are built on the meta device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from mllm.assembly import Assembly
from mllm.config import loading
from mllm.config.recipe import Recipe, Stage
from mllm.errors import MLLMError
from mllm.planning.paper import meta_model
from mllm.saving import STAGES, planned
from mllm.training.guides import assembly_of
from mllm.training.needs import Need, missing, paths_in


@contextlib.contextmanager
def planned_needs(config: Recipe) -> Iterator[list[Need]]:
    """Let the runs that a recipe needs be read, and yield those of them that are not there yet.

    Raises:
        MLLMError: see `mllm.training.needs.missing`; or the model of a needed run cannot be built.
    """
    needs, referred = missing(config), paths_in(config)
    with contextlib.ExitStack() as stack:
        for need in needs:
            *before, last = loading.load(need.recipe).stages
            models = {need.folder: last} | {need.folder / STAGES / stage.name: stage for stage in before}
            for folder in sorted(models.keys() & referred | {need.folder}):
                stack.enter_context(planned(folder, _model(models[folder], need.recipe, config.name)))
        yield needs


def _model(stage: Stage, recipe: str, needed_by: str) -> Assembly:
    """Return a stage's model on the meta device."""
    try:
        model = meta_model(stage)
    except MLLMError as error:
        raise MLLMError(f"The recipe {recipe}, which {needed_by} needs: {error}") from None
    model.spec = assembly_of(stage)
    return model
