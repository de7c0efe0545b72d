"""Define the keys of a recipe's data: the sources, their types and defaults."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from mllm.config.base import Spec
from mllm.config.parts import listed


class DataSpec(BaseModel):
    """One source of items: a reader by name, and how its items are read; other keys are arguments of the reader."""

    model_config = ConfigDict(extra="allow")
    format: str
    weight: float = Field(default=1.0, gt=0)  # how often it is sampled, relative to other sources
    fraction: float = Field(default=1.0, gt=0, le=1)  # of the items, by the seed; a smaller one is a subset of a larger
    concatenate: float = Field(default=0.0, ge=0, le=1)  # how often another pair precedes one (FROMAGe, GILL)
    blank: bool = False  # images are black: what is learned without them
    answer: int | None = Field(default=None, ge=0)  # the number of the answer that is used; null: each, one at a time
    shots: int = Field(default=0, ge=0)  # solved examples before each item, which are no targets

    @model_validator(mode="after")
    def _one_way(self) -> DataSpec:
        if self.shots and self.concatenate:
            raise ValueError("a source has either 'shots' or 'concatenate': give one of the two")
        return self

    @model_serializer(mode="wrap")
    def _without_none(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out an answer that is not chosen: a run that was written before is resumed unchanged."""
        values: dict[str, Any] = write(self)
        return {key: value for key, value in values.items() if key != "answer" or value is not None}

    def options(self) -> dict[str, Any]:
        """Return the arguments of the reader."""
        return dict(self.__pydantic_extra__ or {})

    @property
    def label(self) -> str:
        """Return a few words for plots and tables: the reader, with its task and file where it has them."""
        options = self.options()
        file = str(options.get("path", "")).rstrip("/").rpartition("/")[2]
        return " ".join(filter(None, (self.format, options.get("task"), file)))


Sources = Annotated[list[DataSpec], BeforeValidator(listed)]


class Data(Spec):
    """The training data, and the data of the validation loss."""

    train: Sources = []
    val: Sources = []
    skip: float = Field(default=0.01, ge=0, le=1)  # share of the training items that may be unreadable
    max_length: int | None = Field(default=None, ge=8)  # tokens of an example, images included
    truncate: Literal["drop", "text"] = "drop"  # a longer one is left out, or loses text at its end
    group_by_length: int | None = Field(default=None, ge=2)  # batches that are sampled together and sorted by length
    pack: int | None = Field(default=None, ge=8)  # tokens of a row that holds several examples
