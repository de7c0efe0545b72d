"""Define what the keys of all parts share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict


class Spec(BaseModel):
    """A mapping of the recipe whose keys are all known."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class PartSpec(BaseModel):
    """A part by its registry name; every other key is an argument of the part."""

    model_config = ConfigDict(extra="allow")
    type: str

    def options(self) -> dict[str, Any]:
        """Return the arguments of the part."""
        return dict(self.__pydantic_extra__ or {})


def listed(value: Any) -> Any:
    """Return a list: one mapping is short for a list of one, None for an empty list."""
    return [] if value is None else [value] if isinstance(value, Mapping) else value
