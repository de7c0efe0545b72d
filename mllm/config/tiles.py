"""Define the keys of how an encoder's images are cut into tiles."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from mllm.config.base import Spec


class AnyResolutionSpec(Spec):
    """Tiles of LLaVA-NeXT: see `mllm.media.tiles.AnyResolution`."""

    kind: Literal["anyres"]
    # Rows and columns of tiles.
    grids: list[tuple[PositiveInt, PositiveInt]] = Field(default=[(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)], min_length=1)
    unpad: bool = True  # leave out visual tokens of padding, and end each row with a learned token


class DynamicResolutionSpec(Spec):
    """Tiles of InternVL: see `mllm.media.tiles.DynamicResolution`."""

    kind: Literal["dynamic"]
    least: int = Field(default=1, ge=1)  # tiles, without the thumbnail
    most: int = Field(default=12, ge=1, le=100)

    @model_validator(mode="after")
    def _in_order(self) -> DynamicResolutionSpec:
        if self.least > self.most:
            raise ValueError(f"least is {self.least} and most {self.most}: expected least at most as large")
        return self


TilesSpec = AnyResolutionSpec | DynamicResolutionSpec
