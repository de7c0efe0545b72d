"""Read which keys of a recipe vary and through which values, and make their combinations.

Notable: a run is identified by what its training depends on. Combinations that differ in how answers are generated or
scored (``decoding``, ``scorer``) share a run.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mllm.config import loading
from mllm.config.recipe import Recipe
from mllm.config.yaml_text import parse_yaml
from mllm.errors import MLLMError
from mllm.planning.check import problems

ANSWERING = ("decoding", "scorer", "eval")  # settings that training does not depend on
ABOUT = ("name", "about", "paper", "needs", "track")  # nor on these
ELSEWHERE = {"seed": "--seeds gives the seeds", "eval": "--suites and --limit say what is evaluated"}


@dataclass(frozen=True)
class Combination:
    """A recipe with a value for each key that varies; with none, the recipe as it stands.

    Args:
        recipe: its name or path.
        common: overrides of all combinations.
        values: value by key.
    """

    recipe: str
    common: tuple[str, ...]
    values: dict[str, Any]

    @property
    def label(self) -> str:
        """Return its name in tables."""
        return _label(self.values)

    @property
    def trained_label(self) -> str:
        """Return the part of its label that training depends on."""
        return _label(_trained(self.values))

    def load(self, seed: int | None = None) -> Recipe:
        """Return its recipe."""
        return loading.load(self.recipe, self._overrides(self.values, seed))

    def training_overrides(self, seed: int) -> list[str]:
        """Return the overrides that training depends on."""
        return self._overrides(_trained(self.values), seed)

    def identity(self) -> str:
        """Return a text that two combinations share if their runs and their answers are the same."""
        return training_identity(self.load()) + repr(answering(self.load()))

    def problems(self) -> list[str]:
        """Return what `mllm check` says of it."""
        where = f"{self.label}: " if self.values else ""
        return [f"{where}{problem}" for problem in problems(self.recipe, self._overrides(self.values, None))]

    def _overrides(self, values: dict[str, Any], seed: int | None) -> list[str]:
        values = values if seed is None else {**values, "seed": seed}
        return [*self.common, *(f"{key}={json.dumps(value)}" for key, value in values.items())]


def combinations(recipe: str, common: Sequence[str], vary: Sequence[str]) -> list[Combination]:
    """Return the recipe as it stands and every combination of the values, checked as `mllm check` does.

    Args:
        recipe: a name or a path.
        common: overrides of all combinations.
        vary: ``KEY=V,V``, or ``KEY,KEY=[V,V],[V,V]`` for keys that change together; the values are a YAML list, whose
            brackets may be left out.

    Raises:
        MLLMError: what is not of this form, a key that is given twice or that is not varied here, a combination that
            the recipe refuses, or two that are the same.
    """
    varied = [_variation(text) for text in vary]
    keys = [key for choices in varied for key in choices[0]]
    for key in keys:
        if keys.count(key) > 1:
            raise MLLMError(f"--vary: {key} is there twice. Give all its values in one --vary {key}=...")
        if _part(key) in ELSEWHERE:
            raise MLLMError(f"--vary: {key} does not vary here: {ELSEWHERE[_part(key)]}.")
    stands = Combination(recipe, tuple(common), {})
    products = [dict(itertools.chain(*(choice.items() for choice in each))) for each in itertools.product(*varied)]
    made = [stands, *(Combination(recipe, tuple(common), values) for values in products if values)]
    if wrong := stands.problems() or [problem for each in made for problem in each.problems()]:
        raise MLLMError("Nothing was trained:\n" + "\n".join(f"- {problem}" for problem in wrong))
    return [stands, *_distinct(made[1:])]


def _distinct(made: Sequence[Combination]) -> Sequence[Combination]:
    """Return combinations none of which is another one in other words.

    Raises:
        MLLMError: two are the same.
    """
    labels: dict[str, str] = {}
    for each in made:
        identity = each.identity()
        if identity in labels:
            raise MLLMError(f"--vary: {labels[identity]} and {each.label} are the same model. Leave one of them out.")
        labels[identity] = each.label
    return made


def training_identity(config: Recipe) -> str:
    """Return a hash of what a recipe's training depends on."""
    values = config.model_dump(mode="json", by_alias=True, exclude=set(ABOUT))
    for settings in (values, *values["stages"]):
        for key in (*ANSWERING, *ABOUT[-1:]):
            settings.pop(key, None)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def answering(config: Recipe) -> dict[str, Any]:
    """Return the settings of a recipe's model by which it answers."""
    return {key: getattr(config.stages[-1].assembly, key) for key in ANSWERING[:2]}


def values_in(text: str, label: str, fits: Callable[[Any], bool] = lambda value: True) -> list[Any]:
    """Return the values of a YAML list whose brackets may be left out: ``a,b`` or ``[a, b]``.

    Args:
        text: the list.
        label: names it in an error.
        fits: whether something is such a value; which decides about brackets that may be a value's own.

    Raises:
        MLLMError: it is no list of such values, or an empty one.
    """
    for form in (text, f"[{text}]"):
        with contextlib.suppress(MLLMError, KeyError, TypeError):
            values = parse_yaml(f"value: {form}", label)["value"]
            if isinstance(values, list) and values and all(map(fits, values)):
                return list(values)
    raise MLLMError(f"{label}: {text[:200]!r}: expected values with commas between them, such as a,b.")


def _variation(text: str) -> list[dict[str, Any]]:
    """Return the values of ``KEY=V,V``, or of several keys that change together, each as a mapping by key."""
    names, equals, listed = text.partition("=")
    keys = names.split(",")
    if not equals or not all(keys):
        raise MLLMError(f"--vary {text[:200]!r}: expected KEY=VALUE,VALUE, such as lm.model=a,b.")
    if len(keys) == 1:
        return [{keys[0]: value} for value in values_in(listed, f"--vary {names}")]
    form = f"--vary {names} (values of these keys together, as {names}=[{', '.join('V' * len(keys))}],[...])"
    together = values_in(listed, form, lambda value: isinstance(value, list) and len(value) == len(keys))
    return [dict(zip(keys, values, strict=True)) for values in together]


def _trained(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if _part(key) not in ANSWERING}


def _label(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={_short(value)}" for key, value in values.items())


def _part(key: str) -> str:
    """Return the setting that a key is in: ``decoding`` for ``decoding.num_beams`` and ``stages.1.decoding``."""
    return re.sub(r"^stages\.\d+\.", "", key).partition(".")[0]


def _short(value: Any) -> str:
    """Return a value in YAML's flow style without quotes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_short(member)}" for key, member in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
