"""Read suites: a suite is one YAML file that names the data, the answer mode and the metrics."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from pydantic import Field, field_validator

from mllm.config.base import PartSpec, Spec
from mllm.config.data import DataSpec
from mllm.config.loading import override
from mllm.config.messages import checked
from mllm.config.yaml_text import mapping_of, read_yaml, resolved
from mllm.data.items import Item
from mllm.data.sources import read
from mllm.errors import MLLMError, near
from mllm.media.images import ImageSource
from mllm.registry import table


class Shots(Spec):
    """Solved examples before every item (k-shot)."""

    count: int = Field(0, ge=0)
    select: Literal["random", "fixed", "similar"] = "random"  # others for each item, the same for all, or by the image
    data: DataSpec | None = None  # where they come from; None: the suite's other items
    folder: dict[str, str | None] = Field({})
    separator: str = "\n"  # after each example
    before: str = ""  # words before the examples; {answers}: the words in which the examples' answers differ
    inner: int | None = Field(None, ge=1)  # of the examples with the same answer: the first; None: all
    repeats: int = Field(1, ge=1)  # how often the examples follow one another
    seed: int = 0


class Suite(Spec):
    """The settings of one suite."""

    name: str
    about: str
    data: DataSpec
    folder: dict[str, str | None] = Field({})  # reader's argument -> file or folder inside --data; null: none
    metrics: list[str]
    scorer: PartSpec | None = None  # for metrics that compare images and text; None: the recipe's own
    judge: str | None = None  # a language model, for metrics that ask one
    submission: tuple[str, str] | None = None  # keys of the id and the answer in the file an official server takes
    mirror: dict[str, Any] = Field({})  # columns of the data's parquet mirror (reader parquet), if --data holds that
    answer: str = "generate"  # the answer mode, by its name in the registry group `answers`
    shots: Shots = Shots.model_validate({})
    calibrate: float = Field(0.0, ge=0, le=1)  # of choices: the share of their mean score over all items to subtract
    decoding: dict[str, Any] = Field({})
    batch_size: int = Field(32, ge=1)

    @field_validator("answer")
    @classmethod
    def _registered(cls, answer: str) -> str:
        modes = table("answers")
        if answer not in modes:
            raise ValueError(f"no answer mode has this name. {near(answer, modes)}")
        return answer


def load_suite(name: str, overrides: Sequence[str] = ()) -> Suite:
    """Return a suite by its name, by another package's entry point, or by the path of a YAML file.

    Args:
        name: ``coco-captions``, or ``my/suite.yaml``.
        overrides: dotted, as a recipe's: ``batch_size=8``.

    Raises:
        MLLMError: no suite has that name, the file cannot be read, or a key or an override is wrong.
    """
    names, entry_points = suite_names(), table("suites")
    if name.endswith((".yaml", ".yml")):
        path: Any = Path(name)
    elif name in entry_points:
        module, _, file = entry_points[name].partition(":")
        path = files(module) / file
    elif name in names:
        path = files("mllm.eval") / "suites" / f"{name}.yaml"
    else:
        raise MLLMError(f"No suite is called {name!r}. {near(name, names)}")
    config = OmegaConf.create(mapping_of(read_yaml(Path(str(path))), f"The suite {name}"))
    override(config, overrides, "the suite")
    return checked(Suite, resolved(OmegaConf.to_container(config), f"Suite {name}"), label=f"Suite {name}")


def suite_names() -> list[str]:
    """Return the names of the package's suites, and of those that other packages add."""
    paths = (Path(entry.name) for entry in (files("mllm.eval") / "suites").iterdir())
    return sorted({*(path.stem for path in paths if path.suffix == ".yaml"), *table("suites")})


def read_items(config: Suite, data: str | Path | None) -> list[Item]:
    """Return a suite's items.

    Args:
        config: the suite.
        data: the folder of its files: as their authors publish them, or parquet files of the mirror.

    Raises:
        MLLMError: the suite has files and no folder is given, the reader refuses a file, or two items have one id.
    """
    items = list(read(_located(config.data, config.folder, data, config.name, config.mirror)))
    ids: set[str] = set()
    for item in items:
        if item.id in ids:
            raise MLLMError(f"The suite {config.name}: two items have the id {item.id!r}; expected each once.")
        ids.add(item.id)
    return items


def read_shots(config: Suite, data: str | Path | None, items: Sequence[Item]) -> list[Item]:
    """Return the pool of examples that a suite's shots are taken from: ``shots.data``, or the items themselves.

    Raises:
        MLLMError: fixed shots have no data of their own, or the reader refuses a file.
    """
    shots = config.shots
    if shots.count and shots.data is None and shots.select == "fixed":
        raise MLLMError("Fixed shots would be among the items: name other data in shots.data.")
    if not shots.count or shots.data is None:
        return list(items)
    return list(read(_located(shots.data, shots.folder, data, config.name, {})))


def _located(
    spec: DataSpec, files: Mapping[str, str | None], data: str | Path | None, label: str, mirror: Mapping[str, Any]
) -> DataSpec:
    """Return the reader's settings with the paths of its files inside the folder ``data``."""
    if not files:
        return spec
    if data is None:
        raise MLLMError(f"The suite {label} needs --data DIR, a folder with {', '.join(filter(None, files.values()))}.")
    if mirror and any(Path(data).glob("*.parquet")):
        return DataSpec.model_validate({"format": "parquet", "path": str(data), **mirror})
    paths: dict[str, Any] = {name: path and str(Path(data) / path) for name, path in files.items()}
    return DataSpec(format=spec.format, **spec.options(), **paths)


def data_hash(items: Sequence[Item]) -> str:
    """Return a hash of the items, pixels included; examples before them are not part of it."""
    keys: dict[ImageSource, str] = {}
    groups: dict[int, str] = {}  # a tuple that items share (all images, all choices) is hashed once

    def digest(group: tuple[Any, ...]) -> str:
        if id(group) not in groups:
            for member in group:
                if isinstance(member, ImageSource) and member not in keys:
                    keys[member] = member.key()
            content = [keys[member] if isinstance(member, ImageSource) else member for member in group]
            groups[id(group)] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return groups[id(group)]

    digests = hashlib.sha256()
    for item in items:
        row = [item.id, digest(item.images), item.question, item.answers, digest(item.choices)]
        row += [digest(item.document)] if item.document else []
        digests.update(json.dumps(row).encode())
    return digests.hexdigest()
