"""Read a recipe: one YAML file that names the parts, the data, the objectives and the stages.

Everything configurable enters here, at the edge: OmegaConf merges (``extends``, dotted overrides, a stage's overrides),
pydantic checks. A part is given flat keyword arguments, never the recipe.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mllm.config.lm import lms_in
from mllm.config.messages import checked
from mllm.config.parts import add_resize, encoders_in
from mllm.config.recipe import Recipe, Settings
from mllm.config.yaml_text import parse_yaml, read_yaml, resolved
from mllm.errors import MLLMError, near

CACHE = re.compile(r"((?:stages\.\d+\.)?cache)(\..+)?")  # the path of the cache's settings, or of one of them
LONGEST_CHAIN = 32  # files, each of which extends the next


def find(name: str) -> Path:
    """Return the file of a recipe, given its name or a path to it.

    Raises:
        MLLMError: no such recipe; the near matches are listed.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        if not os.path.isfile(name):
            raise MLLMError(f"There is no recipe file {name[:200]!r}. Give the path of a YAML file, or a name.")
        return Path(name)
    path = Path(str(files("mllm.recipes"))) / f"{name}.yaml"
    if not os.path.isfile(path):
        raise MLLMError(f"No recipe is called {name[:200]!r}. {near(name[:200], names())}")
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
    config = OmegaConf.create(_read(find(name)))
    override(config, overrides, "the recipe")
    return check(resolved(OmegaConf.to_container(config), f"Recipe {name}"), label=name)


def check(values: Any, label: str) -> Recipe:
    """Return a recipe's plain mapping as a checked recipe whose stages are resolved."""
    shared = {key: value for key, value in values.items() if key in Settings.model_fields}
    known = {key: value for key, value in values.items() if key != "extends"}
    stages = values.get("stages")
    if isinstance(stages, list):
        known["stages"] = [_settings(shared, stage) if isinstance(stage, dict) else stage for stage in stages]
    return checked(Recipe, known, label=f"Recipe {label}")


def _settings(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's or a stage's settings, merged with those over them; see `_merged`."""
    merged: dict[str, Any] = _merged(_in_full(base), _in_full(over))
    return merged


def _in_full(values: dict[str, Any]) -> dict[str, Any]:
    """Return settings in which ``cache: on`` is a mapping, as it is merged with one."""
    short = isinstance(values.get("cache"), str | bool)
    return {**values, "cache": {"mode": values["cache"]}} if short else values


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

    In a run that was started before there was ``encoder.resize``, images stay stretched unless the recipe has the key;
    in one of before ``lm.quantize.double``, constants stay as they are.
    """
    before = read_yaml(path) if os.path.lexists(path) else {}
    try:
        complete = all("resize" in encoder for encoder in encoders_in(before))
        short = any(isinstance(lm.get("quantize"), str) for lm in lms_in(before))
    except (AttributeError, TypeError):  # it is no mapping, or one of its values is none
        raise MLLMError(f"{path} is no recipe: it was changed since the run was started. Restore it.") from None
    if complete and not short:
        return recipe
    values = recipe.model_dump(mode="json", by_alias=True)
    if not complete:
        for encoder in encoders_in(values):
            if encoder["resize"] is None:
                del encoder["resize"]
        add_resize(values)
    for lm in lms_in(values) if short else ():
        lm["quantize"] = lm["quantize"] and {**lm["quantize"], "double": False}
    return check(values, label=recipe.name)


def _read(path: Path) -> dict[str, Any]:
    """Return the plain content of a file, merged with those that it extends."""
    chain: list[Path] = []
    contents: list[dict[str, Any]] = []
    following: Path | None = path
    while following is not None:
        path = following.resolve()
        if path in chain:
            raise MLLMError(f"{path}: 'extends' goes in a circle: {' -> '.join(p.stem for p in (*chain, path))}.")
        if len(chain) == LONGEST_CHAIN:
            raise MLLMError(
                f"{chain[0]}: 'extends' names more than {LONGEST_CHAIN} files in a row. Merge some of them."
            )
        content = _content(path)
        chain.append(path)
        contents.append(content)
        following = _extended(path, content.get("extends"))
    whole = contents.pop()
    while contents:
        whole = _settings(whole, contents.pop())
    return whole


def _content(path: Path) -> dict[str, Any]:
    """Return the mapping of one file; the message on a file that is no recipe does not quote it."""
    content = read_yaml(path)
    if not isinstance(content, dict) or (content and not content.keys() & {*Recipe.model_fields, "extends"}):
        raise MLLMError(f"{path} is no recipe. A recipe has keys such as 'encoder', 'lm' and 'stages'.")
    return content


def _extended(path: Path, base: Any) -> Path | None:
    """Return the file that a file extends: a sibling, a path or a recipe's name."""
    if base is None:
        return None
    if not isinstance(base, str):
        raise MLLMError(f"{path}: extends: {base!r}: expected the name of one recipe, or the path of a YAML file.")
    sibling = path.parent / base
    return sibling if os.path.isfile(sibling) else find(base)


def override(config: DictConfig, overrides: Mapping[str, Any] | Sequence[str], label: str) -> None:
    """Set keys of a configuration, by dotted paths.

    Raises:
        MLLMError: an override is not of the form ``key=value``, or leads to no key; ``label`` names what it is for.
    """
    for key, value in _pairs(overrides):
        try:
            key = _beside_the_mode(config, key, value)
            OmegaConf.update(config, key, value, merge=False)
        except (OmegaConfBaseException, LookupError, AssertionError, TypeError, ValueError, RecursionError) as error:
            raise MLLMError(f"The override {key}={value} does not fit {label}: {_first_line(error)}.") from None


def _beside_the_mode(config: DictConfig, key: str, value: Any) -> str:
    """Return the key that an override sets: ``cache=on`` and ``cache.dtype=bfloat16`` leave each other as they are."""
    match = CACHE.fullmatch(key)
    present = OmegaConf.select(config, match[1]) if match else None
    if match and match[2] and isinstance(present, str | bool):
        OmegaConf.update(config, match[1], {"mode": present}, merge=False)
    short = match and not match[2] and OmegaConf.is_dict(present) and isinstance(value, str | bool)
    return f"{key}.mode" if short else key


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
        return parse_yaml(f"value: {text}", "it")["value"]
    except (MLLMError, KeyError, TypeError):
        return text


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
