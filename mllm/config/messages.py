"""Explain what is wrong in a recipe: the key, the value, and the near match."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mllm.errors import MLLMError, near

Model = TypeVar("Model", bound=BaseModel)


def checked(model: type[Model], values: Any, label: str = "These settings do not fit") -> Model:
    """Return ``values`` as a checked ``model``.

    Raises:
        MLLMError: every problem on a line, with the key, the value and the near match.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise MLLMError(f"{label}:\n" + "\n".join(_explain(model, error))) from None


def _explain(model: type[BaseModel], error: ValidationError) -> list[str]:
    """Return a line for each problem: the key, the value, what was expected, the near match."""
    problems = error.errors()
    shared = {(problem["loc"], problem["type"]) for problem in problems}
    lines = []
    for problem in problems:
        location = problem["loc"]
        if location[:1] == ("stages",) and (location[2:], problem["type"]) in shared:
            continue  # a stage repeats what the recipe sets for all
        lines.append(f"  {'.'.join(str(step) for step in location) or 'recipe'}: {_reason(model, problem)}")
    return lines


def _reason(model: type[BaseModel], problem: Any) -> str:
    """Explain what is wrong with one key; a mapping's value is not repeated, as it may be long."""
    if problem["type"] == "extra_forbidden":
        return f"unknown key. {near(str(problem['loc'][-1]), _siblings(model, problem['loc']))}"
    if problem["type"] == "missing":
        return "missing"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] in ("string_type", "literal_error") and isinstance(problem["input"], bool | int | float):
        message += ". Put a word that YAML reads as another kind of value (on, no, 1e5) in quotes"
    return message if isinstance(problem["input"], Mapping) else f"{problem['input']!r}: {message}"


def _siblings(model: Any, location: tuple[int | str, ...]) -> list[str]:
    """Return the known keys of the mapping that has an unknown one."""
    for step in location[:-1]:
        if isinstance(step, int) or not hasattr(model, "model_fields"):
            continue
        field = next((f for name, f in model.model_fields.items() if step in (name, f.alias)), None)
        model = _model_of(field.annotation) if field else model
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_of(annotation: Any) -> Any:
    """Return the pydantic model inside ``X``, ``X | None`` or ``list[X]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        model = _model_of(argument)
        if model is not None:
            return model
    return None
