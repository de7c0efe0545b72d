"""Define what all mappings of a recipe have in common."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict


class Spec(BaseModel):
    """A mapping of the recipe whose keys are all known."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class PartSpec(BaseModel):
    """A part by its registry name; every other key is an argument of the part."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    type: str

    def options(self) -> dict[str, Any]:
        """Return the arguments of the part."""
        return dict(self.__pydantic_extra__ or {})


def each_once(names: list[str]) -> list[str]:
    """Refuse a list that has a name twice."""
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{twice!r} is given twice: leave one of them out")
    return names


def finite(value: Any) -> Any:
    """Refuse numbers inside lists and mappings that are not finite: JSON, in which a run keeps them, has no others."""
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        finite(inner)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value}: expected finite numbers")
    return value


Finite = Annotated[dict[str, Any], AfterValidator(finite)]
