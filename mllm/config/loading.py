"""Read a recipe: one YAML file that names the parts, the data, the objectives and the stages.

Everything configurable enters here, at the edge: OmegaConf merges (``extends``, dotted overrides, a stage's overrides),
pydantic checks. A part is given flat keyword arguments, never the recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mllm.config.messages import checked
from mllm.config.parts import add_resize, encoders_in
from mllm.config.recipe import Recipe, Settings
from mllm.errors import MLLMError, near


def find(name: str) -> Path:
    """Return the file of a recipe, given its name or a path to it.

    Raises:
        MLLMError: no such recipe; the near matches are listed.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        if not Path(name).is_file():
            raise MLLMError(f"There is no recipe file {name!r}. Give the path of a YAML file, or a name.")
        return Path(name)
    path = Path(str(files("mllm.recipes"))) / f"{name}.yaml"
    if not path.is_file():
        raise MLLMError(f"No recipe is called {name!r}. {near(name, names())}")
    return path


def names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in Path(str(files("mllm.recipes"))).glob("*.yaml"))


def load(name: str, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Recipe:
    """Read the recipe ``name`` (a name or a path), apply dotted overrides, and check it.

    Args:
        name: a recipe's name or a path to a YAML file.
        overrides: ``{"connector.type": "mlp"}`` or ``["connector.type=mlp"]``; a list index is a number:
            ``stages.1.steps=50``.

    Raises:
        MLLMError: no such file, not YAML, an unknown key or a wrong type (all of them are listed).
    """
    config = _read(find(name), above=())
    for key, value in _pairs(overrides):
        _override(config, key, value)
    try:
        return check(OmegaConf.to_container(config, resolve=True), label=name)
    except OmegaConfBaseException as error:
        raise MLLMError(f"Recipe {name}: {_first_line(error)}. Text with ${{...}} in it names another key.") from None


def check(values: Any, label: str) -> Recipe:
    """Return a recipe's plain mapping as a checked recipe whose stages are resolved."""
    shared = {key: value for key, value in values.items() if key in Settings.model_fields}
    known = {key: value for key, value in values.items() if key != "extends"}
    stages = values.get("stages")
    if isinstance(stages, list):
        known["stages"] = [_merged(shared, stage) if isinstance(stage, dict) else stage for stage in stages]
    return checked(Recipe, known, label=f"Recipe {label}")


def _merged(base: Any, over: Any) -> Any:
    """Return ``base`` overridden by ``over``: mappings are merged key by key, all else is replaced.

    A mapping that names another part or reader (``type``, ``format``) is replaced too: its options are others.
    """
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    if any(key in over and over[key] != base.get(key, over[key]) for key in ("type", "format")):
        return over
    return {**base, **{key: _merged(base.get(key), value) for key, value in over.items()}}


def dump(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML; `load` reads it back to the same recipe."""
    return OmegaConf.to_yaml(OmegaConf.create(recipe.model_dump(mode="json", by_alias=True)), sort_keys=False)


def continued(recipe: Recipe, path: Path) -> Recipe:
    """Return a recipe to continue a run with, whose own recipe is in a file.

    In a run that was started before there was ``encoder.resize``, images stay stretched unless the recipe has the key.
    """
    before = (yaml.safe_load(path.read_text()) if path.is_file() else None) or {}
    if all("resize" in encoder for encoder in encoders_in(before)):
        return recipe
    values = recipe.model_dump(mode="json", by_alias=True)
    for encoder in encoders_in(values):
        if encoder["resize"] is None:
            del encoder["resize"]
    add_resize(values)
    return check(values, label=recipe.name)


def _read(path: Path, above: tuple[Path, ...]) -> DictConfig:
    """Read one file and the one it extends; ``above`` are the files that extend it."""
    path = path.resolve()
    if path in above:
        raise MLLMError(f"{path}: 'extends' goes in a circle: {' -> '.join(p.stem for p in (*above, path))}.")
    try:
        config = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException) as error:
        raise MLLMError(f"{path} is not a YAML file: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise MLLMError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, DictConfig):
        raise MLLMError(f"{path} holds no mapping. A recipe has keys such as 'encoder', 'lm' and 'stages'.")
    base = config.get("extends")
    if base is None:
        return config
    if not isinstance(base, str):
        raise MLLMError(f"{path}: extends: {base!r}: expected the name of one recipe, or the path of a YAML file.")
    sibling = path.parent / base
    below = _read(sibling if sibling.is_file() else find(base), (*above, path))
    merged = OmegaConf.create(_merged(OmegaConf.to_container(below), OmegaConf.to_container(config)))
    assert isinstance(merged, DictConfig)
    return merged


def _pairs(overrides: Mapping[str, Any] | Sequence[str]) -> list[tuple[str, Any]]:
    if isinstance(overrides, Mapping):
        return list(overrides.items())
    pairs = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise MLLMError(f"The override {text!r} is not of the form key=value, for example stages.1.steps=50.")
        pairs.append((key, _parsed(value)))
    return pairs


def _parsed(text: str) -> Any:
    """Return an override's value read as YAML; if it is no YAML (``Question: {question}``), it is text."""
    try:
        parsed = OmegaConf.to_container(OmegaConf.create(f"value: {text}"))
    except (YAMLError, OmegaConfBaseException):
        return text
    assert isinstance(parsed, dict)
    return parsed["value"]


def _override(config: DictConfig, key: str, value: Any) -> None:
    try:
        OmegaConf.update(config, key, value, merge=False)
    except (OmegaConfBaseException, IndexError, AssertionError, TypeError, ValueError) as error:
        raise MLLMError(f"The override {key}={value} does not fit the recipe: {_first_line(error)}.") from None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
