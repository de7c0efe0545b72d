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

from mllm.data.items import Item
from mllm.data.loading import read
from mllm.errors import MLLMError, near
from mllm.images import ImageSource
from mllm.registry import table
from mllm.spec import DataSpec, PartSpec, Spec, checked


class Suite(Spec):
    """One suite: which data, how it is put, what is measured."""

    name: str
    about: str
    data: DataSpec
    folder: dict[str, str] = Field({})  # reader's argument -> file or folder inside --data
    metrics: list[str]
    scorer: PartSpec | None = None  # for metrics that compare images and text; None: the recipe's own
    judge: str | None = None  # a language model, for metrics that ask one
    submission: tuple[str, str] | None = None  # keys of the id and the answer in the file an official server takes
    answer: Literal["generate", "choose"] = "generate"  # choose: the most likely of the item's choices
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


def read_items(data: DataSpec, folder: Mapping[str, str], place: str | Path | None, label: str) -> list[Item]:
    """Return a data set's items, its files looked for in ``place``.

    Raises:
        MLLMError: files are wanted and no place is given, or the reader finds something wrong; two items of one id.
    """
    options = data.options()
    if folder:
        if place is None:
            raise MLLMError(f"The suite {label} needs --data DIR, a folder with {', '.join(folder.values())}.")
        options.update({name: str(Path(place) / path) for name, path in folder.items()})
    items = read(DataSpec(format=data.format, **options))
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise MLLMError(f"The suite {label}: two items have the id {item.id!r}; expected each once.")
        seen.add(item.id)
    return items


def data_hash(items: Sequence[Item]) -> str:
    """Return what tells these items, pixels included, from others."""
    keys: dict[ImageSource, str] = {}
    whole = hashlib.sha256()
    for image in (image for item in items for image in item.images):
        if image not in keys:
            keys[image] = image.key()
    for item in items:
        images = [keys[image] for image in item.images]
        whole.update(json.dumps([item.id, images, item.question, item.answers, item.choices]).encode())
    return whole.hexdigest()
