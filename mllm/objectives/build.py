"""Build the objectives of a stage."""

from __future__ import annotations

from collections.abc import Sequence

from mllm.config.fit import ObjectiveSpec
from mllm.registry import lookup, made
from mllm.slots import Objective


def objectives_of(specs: Sequence[ObjectiveSpec]) -> list[Objective]:
    """Return the objectives of a stage.

    Raises:
        MLLMError: an unknown objective, or an option that it does not take.
    """
    return [made(lookup("objectives", spec.type), f"objective {spec.type}", **spec.options()) for spec in specs]
