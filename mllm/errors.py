"""The one exception a user can cause, the near-match help its messages carry, and the warning about renamed things."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, ParamSpec, TypeVar

WORD, LONGEST = 500, 6000  # characters of a word, and of a message
P = ParamSpec("P")
R = TypeVar("R")


class MLLMError(ValueError):
    """Something the user can fix: the message says what was wrong, what was expected, and what to do.

    The command line prints it and exits with status 1; a traceback is shown with ``--debug`` only. Messages quote what
    users wrote: a long word of it is cut, and what cannot be printed is escaped.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


def printable(message: str) -> str:
    """Return a message of a readable length, without control characters and halves of characters."""
    if len(message) > LONGEST:
        message = f"{message[:LONGEST]}... and {len(message) - LONGEST} more characters"
    short = re.sub(rf"\S{{{WORD + 3},}}", lambda match: f"{match[0][:WORD]}...", message)
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", lambda match: ascii(match[0])[1:-1], short)


def near(name: str, known: Iterable[str]) -> str:
    """Return the sentence that helps with an unknown ``name``: the near matches, else all that is known."""
    known = sorted(known)
    matches = get_close_matches(name, known, n=3, cutoff=0.5)
    if matches:
        return f"Did you mean {' or '.join(repr(match) for match in matches)}?"
    return f"Known: {', '.join(known) or 'none'}."


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message, after its type where the message alone says little."""
    lines = str(error).strip().splitlines() or ["no message"]
    plain = isinstance(error, OSError | ImportError | RuntimeError) or len(lines[0]) > 60
    return lines[0][:300] if plain else f"{type(error).__name__}: {lines[0]}."


@functools.cache
def warn_renamed(old: str, new: str) -> None:
    """Warn, once per process, that something is called by its former name."""
    warnings.warn(f"{old} is now called {new}; the former name will be removed.", FutureWarning, stacklevel=3)


def renamed_options(options: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return options under their present names.

    Args:
        options: as a user wrote them; a former name warns once.
        names: former name -> present name.

    Raises:
        MLLMError: an option is given under both names.
    """
    renamed = {}
    for name, value in options.items():
        present = names.get(name, name)
        if present != name:
            warn_renamed(f"The option {name!r}", repr(present))
        if present in renamed:
            raise MLLMError(f"The option {present!r} is given twice, once by a former name. Leave one of them out.")
        renamed[present] = value
    return renamed


def renamed_method(old: str, method: Callable[P, R]) -> Callable[P, R]:
    """Return a method under its former name, which warns once."""

    @functools.wraps(method)
    def alias(*args: P.args, **options: P.kwargs) -> R:
        warn_renamed(f"{old}()", f"{method.__name__}()")
        return method(*args, **options)

    return alias
