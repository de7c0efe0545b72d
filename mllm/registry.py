"""Find a part by its exact name: one table of built-in parts, joined by other packages' entry points.

Values are lazy ``"module:attribute"`` strings, so listing names imports nothing. A package adds parts with entry points
in the same groups (``mllm.connectors``, ...), and the same lookup finds them. A built-in part that was renamed is still
found by its former name (`mllm.builtin.RENAMED`), with one warning.
"""

from __future__ import annotations

import inspect
import math
import operator
import types
import typing
import warnings
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from numbers import Real
from typing import Annotated, Any, TypeVar, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

from mllm.builtin import BUILT_IN, RENAMED
from mllm.errors import MLLMError, first_line, near

Slot = TypeVar("Slot")

# Types of a part's arguments, of which `made` checks the range.
Count = Annotated[int, Ge(1)]
Dropout = Annotated[float, Ge(0), Lt(1)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]

_COMPARISONS: dict[type, tuple[str, str]] = {
    Ge: ("ge", "at least"),
    Gt: ("gt", "more than"),
    Le: ("le", "at most"),
    Lt: ("lt", "less than"),
}


@cache
def table(group: str) -> dict[str, str]:
    """Return name -> ``"module:attribute"`` of one group, entry points of installed packages included.

    Former names of renamed parts are not listed, and no package may use one.

    Raises:
        MLLMError: two packages register one name.
    """
    targets = dict(BUILT_IN[group])
    former = {old: targets[new] for old, new in RENAMED.get(group, {}).items()}
    for point in entry_points(group=f"mllm.{group}"):
        other = former.get(point.name) or targets.get(point.name, point.value)
        if point.name in former or other != point.value:
            raise MLLMError(
                f"Two parts are called {point.name!r} in mllm.{group}: {other} and {point.value}. "
                "Uninstall one of the packages, or rename its entry point."
            )
        targets[point.name] = point.value
    return targets


@cache
def current_name(group: str, name: str) -> str:
    """Return the name that a part has now; a former name warns, once per process."""
    if name not in RENAMED.get(group, {}):
        return name
    current = RENAMED[group][name]
    warnings.warn(
        f"The part {name!r} of mllm.{group} is now called {current!r}; the former name will be removed. Write "
        f"{current!r} instead.",
        FutureWarning,
        stacklevel=3,
    )
    return current


def lookup(group: str, name: str) -> Any:
    """Import and return the part ``name`` of ``group`` (``"connectors"``, ``"metrics"``, ...).

    Raises:
        MLLMError: no part has that name (the near matches are listed), or another package's part cannot be imported.
    """
    targets, name = table(group), current_name(group, name)
    if name not in targets:
        raise MLLMError(f"No part called {name!r} in mllm.{group}. {near(name, targets)}")
    module, _, attribute = targets[name].partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        if targets[name] == BUILT_IN[group].get(name):
            raise
        raise MLLMError(
            f"The part {name!r} of mllm.{group} is {targets[name]} of another package, and cannot be imported: "
            f"{error}. Repair or uninstall that package."
        ) from error


def group_of(name: str, groups: Sequence[str]) -> str:
    """Return the first of several groups that has a part of a name.

    Raises:
        MLLMError: none of them has; the near matches are listed.
    """
    names = {part: group for group in reversed(groups) for part in table(group)}
    if name not in names:
        raise MLLMError(
            f"No part called {name!r} in {', '.join(f'mllm.{group}' for group in groups)}. {near(name, names)}"
        )
    return names[name]


def made(cls: Any, label: str, *inside: Any, **options: Any) -> Any:
    """Return an instance of a part's class; what its constructor raises is the user's error.

    Raises:
        MLLMError: an unknown argument (the near matches are listed), a missing one, a text or the like where the part's
            signature has a number, a number out of its range (`Count`, `Dropout`, ...), or any other argument, or file
            that an argument names, with which the part cannot be built.
    """
    signature = inspect.signature(cls)
    try:
        signature.bind(*inside, **options)
    except TypeError as error:
        unknown = [name for name in options if name not in signature.parameters]
        known = [name for name in signature.parameters if name not in (*options, "seed")]
        help_ = f" {near(unknown[0], known)}" if unknown and known else ""
        raise MLLMError(f"The {label} does not take these arguments: {error}.{help_}") from None
    hints = _annotations(cls)
    for name, value in options.items():
        if (problem := _wrong_number(hints.get(name), value)) is not None:
            raise MLLMError(f"The {label} has {name}={value!r}; expected {problem}.")
    try:
        return cls(*inside, **options)
    except MLLMError:
        raise
    except Exception as error:  # of torch, peft, transformers: each checks its arguments in its own way
        given = ", ".join(f"{name}={value!r}" for name, value in options.items() if isinstance(value, str | Real))
        raise MLLMError(
            f"The {label} cannot be built: {first_line(error)} Check its files and its arguments: {given}."
        ) from error


def _wrong_number(annotation: Any, value: Any) -> str | None:
    """Return what is expected, if an argument that is a number by its annotation is none, or out of its range."""
    kinds = _members(annotation)
    numbers = [kind for kind in kinds if typing.get_origin(kind) is Annotated or kind in (int, float)]
    if not numbers or len(numbers) < sum(kind is not type(None) for kind in kinds):
        return None  # other types are possible, too
    if value is None:
        return None if type(None) in kinds else "a number"
    if not isinstance(value, Real) or not math.isfinite(value):
        return "a number"
    whole = numbers[0] is int or typing.get_args(numbers[0])[:1] == (int,)
    if whole and float(value) % 1:
        return "a whole number"
    limits = [limit for limit in getattr(numbers[0], "__metadata__", ()) if type(limit) in _COMPARISONS]
    named = [(limit, *_COMPARISONS[type(limit)]) for limit in limits]
    if all(getattr(operator, name)(value, getattr(limit, name)) for limit, name, _ in named):
        return None
    return "a number of " + " and ".join(f"{words} {getattr(limit, name)}" for limit, name, words in named)


def _members(annotation: Any) -> tuple[Any, ...]:
    """Return the types in a union; one type is a union of itself."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def fulfilled(contract: type[Slot], label: str, part: Any) -> Slot:
    """Return a part that fulfils the contract of its slot.

    Raises:
        MLLMError: it does not; it is a part of another package.
    """
    if not isinstance(part, contract):
        name = f"{contract.__module__}.{contract.__name__}"
        raise MLLMError(
            f"The {label} is a {type(part).__name__}, and not an {name}: inherit from that class, or give it the "
            "methods that are listed there."
        )
    return part


def _annotations(cls: Any) -> dict[str, Any]:
    """Return the types of a part's arguments, with their ranges, as far as they can be read."""
    try:
        return get_type_hints(vars(cls)["__init__"] if isinstance(cls, type) else cls, include_extras=True)
    except (KeyError, NameError, TypeError):
        return {}
