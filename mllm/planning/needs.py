"""Check and plan a recipe before the runs that it needs are trained: their models are built on the meta device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from mllm.config import loading
from mllm.config.recipe import Recipe
from mllm.errors import MLLMError
from mllm.planning.paper import meta_model
from mllm.saving import planned
from mllm.training.guides import assembly_of
from mllm.training.needs import Need, missing


@contextlib.contextmanager
def planned_needs(config: Recipe) -> Iterator[list[Need]]:
    """Let the runs that a recipe needs be read, and yield those of them that are not there yet.

    Raises:
        MLLMError: see `mllm.training.needs.missing`; or the model of a needed run cannot be built.
    """
    needs = missing(config)
    with contextlib.ExitStack() as stack:
        for need in needs:
            stage = loading.load(need.recipe).stages[-1]
            try:
                model = meta_model(stage)
            except MLLMError as error:
                raise MLLMError(f"The recipe {need.recipe}, which {config.name} needs: {error}") from None
            model.spec = assembly_of(stage)
            stack.enter_context(planned(need.folder, model))
        yield needs
