"""Find a part by its exact name: one table of built-in parts, joined by other packages' entry points.

Values are lazy ``"module:attribute"`` strings, so listing names imports nothing. A package adds parts of its own with
entry points in the same groups (``mllm.connectors``, ...), and they are found by the same lookup.
"""

from __future__ import annotations

import inspect
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from mllm.builtin import BUILT_IN
from mllm.errors import MLLMError, near


@cache
def table(group: str) -> dict[str, str]:
    """Return name -> ``"module:attribute"`` of one group, entry points of installed packages included.

    Raises:
        MLLMError: two packages claim one name.
    """
    found = dict(BUILT_IN[group])
    for point in entry_points(group=f"mllm.{group}"):
        if found.get(point.name, point.value) != point.value:
            raise MLLMError(
                f"Two parts are called {point.name!r} in mllm.{group}: {found[point.name]} and {point.value}. "
                "Uninstall one of the packages, or rename its entry point."
            )
        found[point.name] = point.value
    return found


def lookup(group: str, name: str) -> Any:
    """Import and return the part ``name`` of ``group`` (``"connectors"``, ``"metrics"``, ...).

    Raises:
        MLLMError: no part has that name (the near matches are listed), or another package's part cannot be imported.
    """
    known = table(group)
    if name not in known:
        raise MLLMError(f"No part called {name!r} in mllm.{group}. {near(name, known)}")
    module, _, attribute = known[name].partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        if known[name] == BUILT_IN[group].get(name):
            raise
        raise MLLMError(
            f"The part {name!r} of mllm.{group} is {known[name]} of another package, and cannot be imported: "
            f"{error}. Mend or uninstall that package."
        ) from error


def made(cls: Any, label: str, *inside: Any, **options: Any) -> Any:
    """Build a part; an argument it does not take is the user's error.

    Raises:
        MLLMError: an argument that is not known (the near matches are listed), or one that is missing.
    """
    signature = inspect.signature(cls)
    try:
        signature.bind(*inside, **options)
    except TypeError as error:
        unknown = [name for name in options if name not in signature.parameters]
        known = [name for name in signature.parameters if name not in (*options, "seed")]
        help_ = f" {near(unknown[0], known)}" if unknown and known else ""
        raise MLLMError(f"The {label} does not take these arguments: {error}.{help_}") from None
    return cls(*inside, **options)
