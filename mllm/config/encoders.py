"""Define the keys of an encoder, and how it cuts images into tiles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from mllm.config.base import PartSpec, Spec, listed

RESIZING = ("transformers", "timm", "open-clip")  # types of encoders that have 'resize'


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


class EncoderSpec(PartSpec):
    """The frozen encoder: which model, and which of its outputs. Every other key is an argument of its type."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    type: str = "transformers"
    fuse: Literal["width", "sequence"] | None = None  # how the encoders in 'of' are joined
    of: Annotated[list[EncoderSpec] | None, BeforeValidator(lambda value: listed(value) or None)] = None
    model: str | None = Field(default=None, min_length=1, validate_default=True)
    layer: int | None = None  # index into the hidden states; null: the model's last output
    select: Literal["patches", "pooled", "all"] = "patches"
    resolution: int | None = Field(default=None, ge=1)  # pixels; null: the image processor's
    resize: Literal["stretch", "crop", "pad"] | None = None  # how an image becomes a square; null: the model's own way
    init: Literal["pretrained", "random"] = "pretrained"
    tiles: TilesSpec | None = Field(default=None, discriminator="kind")  # null: every image is encoded as a whole

    @model_validator(mode="after")
    def _tiles_fit(self) -> EncoderSpec:
        if any(member.tiles is not None for member in self.of or ()):
            raise ValueError("tiles: encoders in 'of' cannot cut images. Leave tiles out")
        if self.tiles is not None and self.type not in RESIZING:
            raise ValueError(f"tiles: expected an encoder of type {', '.join(RESIZING)}")
        if self.tiles is not None and self.resize not in (None, "stretch"):
            raise ValueError(f"tiles: they decide how an image becomes squares, and resize is {self.resize}")
        return self

    @model_serializer(mode="wrap")
    def _without_none(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out tiles that are not there: a run that was written before is resumed unchanged."""
        values: dict[str, Any] = write(self)
        return {key: value for key, value in values.items() if key != "tiles" or value is not None}

    @model_validator(mode="before")
    @classmethod
    def _fused(cls, values: Any) -> Any:
        return {"type": "fuse", **values} if isinstance(values, dict) and values.get("fuse") else values

    @field_validator("model")
    @classmethod
    def _some_model(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and not info.data.get("of") and info.data.get("type") == "transformers":
            raise ValueError("give an installed part, a folder or a hub id")
        return value

    @property
    def label(self) -> str:
        """Return its name in tables: its model, or those of the encoders inside it."""
        return self.model or " + ".join(member.label for member in self.of or ()) or self.type

    def options(self) -> dict[str, Any]:
        """Return the arguments of the encoder that differ from their defaults, without those in ``of``."""
        return self.model_dump(exclude={"type", "of", "tiles"}, exclude_defaults=True)


def encoders_in(parts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the mappings of the encoder of a recipe, of its stages, or of a saved model, and of those inside it."""
    for stage in parts.get("stages") or ():
        yield from encoders_in(stage)
    waiting = [parts.get("encoder")]
    while waiting:
        if isinstance(encoder := waiting.pop(), dict):
            yield encoder
            waiting += encoder.get("of") or []


def add_resize(parts: Mapping[str, Any]) -> None:
    """Set ``resize`` of encoders that were saved before there was this key: their images were stretched."""
    for encoder in encoders_in(parts):
        if "resize" not in encoder and encoder.get("type", "transformers") in RESIZING:
            encoder["resize"] = "stretch"
