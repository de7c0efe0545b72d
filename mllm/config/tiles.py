"""Define the keys of how an encoder's images are cut into tiles."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from mllm.config.base import Spec

MOST_GRIDS = 10  # rows or columns of tiles
Sides = tuple[PositiveInt, PositiveInt]


class AnyResolutionSpec(Spec):
    """Tiles of LLaVA-NeXT and LLaVA-OneVision: see `mllm.media.tilings.AnyResolution`."""

    kind: Literal["anyres"]
    # Rows and columns of tiles; a number: all grids of up to as many rows and columns.
    grids: Annotated[int, Field(ge=1, le=MOST_GRIDS)] | Annotated[list[Sides], Field(min_length=1)] = [
        (1, 2),
        (2, 1),
        (2, 2),
        (3, 1),
        (1, 3),
    ]
    unpad: bool = True  # leave out visual tokens of padding, and end each row with a learned token
    limit: PositiveInt | None = None  # reduce grids with more visual tokens than about so many tiles

    @model_validator(mode="after")
    def _has_rows(self) -> AnyResolutionSpec:
        if self.limit is not None and not self.unpad:
            raise ValueError("limit reduces rows of visual tokens, and with unpad=false there are none")
        return self

    @property
    def choices(self) -> list[Sides]:
        """The grids."""
        if not isinstance(self.grids, int):
            return self.grids
        numbers = range(1, self.grids + 1)
        return [(rows, columns) for rows in numbers for columns in numbers]


class DynamicResolutionSpec(Spec):
    """Tiles of InternVL: see `mllm.media.tilings.DynamicResolution`."""

    kind: Literal["dynamic"]
    least: int = Field(default=1, ge=1)  # tiles, without the thumbnail
    most: int = Field(default=12, ge=1, le=100)

    @model_validator(mode="after")
    def _in_order(self) -> DynamicResolutionSpec:
        if self.least > self.most:
            raise ValueError(f"least is {self.least} and most {self.most}: expected least at most as large")
        return self


class SplitSpec(Spec):
    """Tiles of Idefics3 and SmolVLM: see `mllm.media.tilings.Split`."""

    kind: Literal["split"]
    longest: int = Field(default=4, ge=1, le=MOST_GRIDS)  # tiles along the longer side


TilesSpec = AnyResolutionSpec | DynamicResolutionSpec | SplitSpec
