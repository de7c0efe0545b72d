"""Find a part by its exact name: one table of built-in parts, joined by other packages' entry points.

Values are lazy ``"module:attribute"`` strings, so listing names imports nothing. A package adds parts with entry points
in the same groups (``mllm.connectors``, ...), and the same lookup finds them. A built-in part that was renamed is still
found by its former name (`mllm.builtin.RENAMED`), with one warning.
"""

from __future__ import annotations

import inspect
import math
import warnings
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from numbers import Real
from typing import Any, TypeVar, get_type_hints

from mllm.builtin import BUILT_IN, RENAMED
from mllm.errors import MLLMError, near

Slot = TypeVar("Slot")
NUMBERS = (int, float, int | None, float | None)  # types of arguments


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


def made(cls: Any, label: str, *inside: Any, **options: Any) -> Any:
    """Return an instance of a part's class; an argument that it does not take is the user's error.

    Raises:
        MLLMError: an unknown argument (the near matches are listed), a missing one, or a text or the like where the
            part's signature has a number.
    """
    signature = inspect.signature(cls)
    try:
        signature.bind(*inside, **options)
    except TypeError as error:
        unknown = [name for name in options if name not in signature.parameters]
        known = [name for name in signature.parameters if name not in (*options, "seed")]
        help_ = f" {near(unknown[0], known)}" if unknown and known else ""
        raise MLLMError(f"The {label} does not take these arguments: {error}.{help_}") from None
    types = _annotations(cls)
    for name, value in options.items():
        is_number = isinstance(value, Real) and math.isfinite(value)
        is_absent = value is None and types.get(name) not in (int, float)
        if types.get(name) in NUMBERS and not is_number and not is_absent:
            raise MLLMError(f"The {label} has {name}={value!r}; expected a number.")
    return cls(*inside, **options)


def fulfilled(contract: type[Slot], label: str, part: Any) -> Slot:
    """Return a part that fulfils the contract of its slot.

    Raises:
        MLLMError: it does not; it is a part of another package.
    """
    if not isinstance(part, contract):
        raise MLLMError(
            f"The {label} is a {type(part).__name__}, and not an mllm.slots.{contract.__name__}: inherit from that "
            "class, or give it the methods that are listed there."
        )
    return part


def _annotations(cls: Any) -> dict[str, Any]:
    """Return the types of a part's arguments, as far as they can be read."""
    try:
        return get_type_hints(vars(cls)["__init__"] if isinstance(cls, type) else cls)
    except (KeyError, NameError, TypeError):
        return {}
