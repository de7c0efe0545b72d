"""Define the keys of a recipe's evaluation: its suites with what each changes, and how often they run in training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from mllm.config.base import Spec


class SuiteSpec(BaseModel):
    """A suite, the folder of its files, and overrides of its settings by dotted keys; a name alone is short for it."""

    model_config = ConfigDict(extra="allow")
    suite: str = Field(min_length=1)  # its name, or the path of its YAML file
    data: str | None = None  # the folder of its files; null: they are embedded

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"suite": value} if isinstance(value, str) else value

    @model_serializer(mode="wrap")
    def _without_defaults(self, write: SerializerFunctionWrapHandler) -> Any:
        values = {key: value for key, value in write(self).items() if key != "data" or value is not None}
        return values["suite"] if values.keys() == {"suite"} else values

    @property
    def overrides(self) -> list[str]:
        """Return the overrides as `mllm eval` takes them: ``shots.count=4``."""
        return [f"{key}={json.dumps(value)}" for key, value in _dotted(self.__pydantic_extra__ or {})]

    @property
    def label(self) -> str:
        """Return its name in tables: with the overrides."""
        return ", ".join([self.suite, *self.overrides])

    @property
    def folder(self) -> str:
        """Return the name of the folder of its reports."""
        return "-".join([Path(self.suite).stem, *self.overrides]).replace("/", "_")


def _dotted(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


class EvalSpec(Spec):
    """Suites that a recipe is evaluated on (`mllm recipes verify`), and what is evaluated while training."""

    suites: list[SuiteSpec] = []
    limit: int | None = Field(default=None, ge=1)  # items of a suite; null: all
    every: int | None = Field(default=None, ge=1)  # steps, after which the suites run and the items below are answered
    show: int = Field(default=4, ge=0)  # validation items whose answers are logged each time

    @field_validator("suites")
    @classmethod
    def _each_once(cls, suites: list[SuiteSpec]) -> list[SuiteSpec]:
        folders = [suite.folder for suite in suites]
        if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
            raise ValueError(f"two suites would write their reports to {twice}: expected each once")
        return suites
