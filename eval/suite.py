"""A suite: one YAML file that says which data, how it is put to the model, and what is measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field

from mllm.config.data import DataSpec
from mllm.config.messages import checked
from mllm.config.parts import PartSpec, Spec
from mllm.data.items import Item
from mllm.data.sources import read
from mllm.errors import MLLMError, near
from mllm.media.images import ImageSource
from mllm.registry import table


class Shots(Spec):
    """Solved examples that are shown before every item."""

    count: int = Field(0, ge=0)
    select: Literal["random", "fixed", "similar"] = "random"  # for each item anew, the same for all, or by the image
    data: DataSpec | None = None  # where they are from; None: the suite's own items, never the item itself
    folder: dict[str, str | None] = Field({})
    separator: str = "\n"  # behind each example
    seed: int = 0


class Suite(Spec):
    """One suite: which data, how it is put, what is measured."""

    name: str
    about: str
    data: DataSpec
    folder: dict[str, str | None] = Field({})  # reader's argument -> file or folder inside --data; null: none
    metrics: list[str]
    scorer: PartSpec | None = None  # for metrics that compare images and text; None: the recipe's own
    judge: str | None = None  # a language model, for metrics that ask one
    submission: tuple[str, str] | None = None  # keys of the id and the answer in the file an official server takes
    mirror: dict[str, Any] = Field({})  # columns of the data's parquet mirror (reader parquet), if --data holds that
    # choose, order: the most likely of the item's choices, or all, the most likely first; match: images and choices,
    # all pairs; closest, rank: by the scorer; draw: a picture; decide: whether one is looked up or made
    answer: Literal["generate", "choose", "order", "match", "closest", "rank", "draw", "decide"] = "generate"
    shots: Shots = Shots.model_validate({})
    calibrate: float = Field(0.0, ge=0, le=1)  # of choices: the share of their mean score over all items taken off
    decoding: dict[str, Any] = Field({})
    batch_size: int = Field(32, ge=1)


def load_suite(name: str, overrides: Sequence[str] = ()) -> Suite:
    """Return a suite by its name, by another package's entry point, or by the path of a YAML file.

    Args:
        name: ``coco-captions``, or ``my/suite.yaml``.
        overrides: dotted, as a recipe's: ``batch_size=8``.

    Raises:
        MLLMError: no suite has that name, the file cannot be read, or a key or an override is wrong.
    """
    known = suite_names()
    places = table("suites")
    if name.endswith((".yaml", ".yml")):
        path: Any = Path(name)
    elif name in places:
        module, _, file = places[name].partition(":")
        path = files(module) / file
    elif name in known:
        path = files("mllm.eval") / "suites" / f"{name}.yaml"
    else:
        raise MLLMError(f"No suite is called {name!r}. {near(name, known)}")
    try:
        config = OmegaConf.merge(OmegaConf.create(path.read_text()), OmegaConf.from_dotlist(list(overrides)))
        content = OmegaConf.to_container(config, resolve=True)
    except (OSError, OmegaConfBaseException, ValueError) as error:
        raise MLLMError(f"The suite {name} cannot be read: {error}") from None
    return checked(Suite, content, label=f"Suite {name}")


def suite_names() -> list[str]:
    """Return the names of the suites that come with the package, and of other packages'."""
    own = (Path(entry.name) for entry in (files("mllm.eval") / "suites").iterdir())
    return sorted({*(name.stem for name in own if name.suffix == ".yaml"), *table("suites")})


def read_items(config: Suite, place: str | Path | None) -> list[Item]:
    """Return a suite's items, its files looked for in ``place``: its authors' own, or parquet files of its mirror.

    Raises:
        MLLMError: files are wanted and no place is given, or the reader finds something wrong; two items of one id.
    """
    items = list(read(_located(config.data, config.folder, place, config.name, config.mirror)))
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise MLLMError(f"The suite {config.name}: two items have the id {item.id!r}; expected each once.")
        seen.add(item.id)
    return items


def read_shots(config: Suite, place: str | Path | None, items: Sequence[Item]) -> list[Item]:
    """Return the examples a suite draws its shots from: the data named for it, or the items themselves.

    Raises:
        MLLMError: fixed shots have no data of their own, or the reader finds something wrong.
    """
    shots = config.shots
    if shots.count and shots.data is None and shots.select == "fixed":
        raise MLLMError("Fixed shots would be among the items: name other data in shots.data.")
    if not shots.count or shots.data is None:
        return list(items)
    return list(read(_located(shots.data, shots.folder, place, config.name, {})))


def _located(
    data: DataSpec, folder: Mapping[str, str | None], place: str | Path | None, label: str, mirror: Mapping[str, Any]
) -> DataSpec:
    """Return the reader with its files' places."""
    if not folder:
        return data
    if place is None:
        raise MLLMError(
            f"The suite {label} needs --data DIR, a folder with {', '.join(filter(None, folder.values()))}."
        )
    if mirror and any(Path(place).glob("*.parquet")):
        return DataSpec.model_validate({"format": "parquet", "path": str(place), **mirror})
    inside: dict[str, Any] = {name: path and str(Path(place) / path) for name, path in folder.items()}
    return DataSpec(format=data.format, **data.options(), **inside)


def data_hash(items: Sequence[Item]) -> str:
    """Return what tells these items, pixels included, from others; examples before them are not looked at."""
    keys: dict[ImageSource, str] = {}
    groups: dict[int, str] = {}  # a tuple that items share (all pictures, all choices) is read once

    def digest(group: tuple[Any, ...]) -> str:
        if id(group) not in groups:
            for member in group:
                if isinstance(member, ImageSource) and member not in keys:
                    keys[member] = member.key()
            content = [keys[member] if isinstance(member, ImageSource) else member for member in group]
            groups[id(group)] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return groups[id(group)]

    whole = hashlib.sha256()
    for item in items:
        row = [item.id, digest(item.images), item.question, item.answers, digest(item.choices)]
        row += [digest(item.document)] if item.document else []
        whole.update(json.dumps(row).encode())
    return whole.hexdigest()
