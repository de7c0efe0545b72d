"""What is trained on: the keys of a source, their types and defaults."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from mllm.config.parts import Spec, listed


class DataSpec(BaseModel):
    """One source of items: a reader by name, and how its items come; every other key is an argument of the reader."""

    model_config = ConfigDict(extra="allow")
    format: str
    weight: float = Field(default=1.0, gt=0)  # how often it is drawn from, beside other sources
    fraction: float = Field(default=1.0, gt=0, le=1)  # of the items, by the seed; the smaller is part of the larger
    concatenate: float = Field(default=0.0, ge=0, le=1)  # how often another pair is put before one (FROMAGe, GILL)
    blank: bool = False  # pictures are black: what is learnt without seeing
    shots: int = Field(default=0, ge=0)  # solved examples before each item; of them nothing is learnt

    @model_validator(mode="after")
    def _one_way(self) -> DataSpec:
        if self.shots and self.concatenate:
            raise ValueError("a source has either 'shots' or 'concatenate': give one of the two")
        return self

    def options(self) -> dict[str, Any]:
        """Return the arguments of the reader."""
        return dict(self.__pydantic_extra__ or {})


Sources = Annotated[list[DataSpec], BeforeValidator(listed)]


class Data(Spec):
    """What is trained on, and what the validation loss is computed on."""

    train: Sources = []
    val: Sources = []
    skip: float = Field(default=0.01, ge=0, le=1)  # of the training items, the share that may turn out unreadable
    max_length: int | None = Field(default=None, ge=8)  # positions of an example, images included
    truncate: Literal["drop", "text"] = "drop"  # what is longer is left out, or loses text at its end
    group_by_length: int | None = Field(default=None, ge=2)  # batches that are drawn together and cut by length
    pack: int | None = Field(default=None, ge=8)  # positions of a row that holds several examples
