"""Define what all mappings of a recipe have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


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
