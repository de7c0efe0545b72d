"""Define the exception for errors that a user can fix, and the near-match help of its messages."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class MLLMError(ValueError):
    """An error that the user can fix: the message says what was wrong, what was expected, and what to do.

    The command line prints the message and exits with status 1; ``--debug`` shows the traceback.
    """


def near(name: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown ``name``: the near matches, or else all known names."""
    known = sorted(known)
    matches = get_close_matches(name, known, n=3, cutoff=0.5)
    if matches:
        return f"Did you mean {' or '.join(repr(match) for match in matches)}?"
    return f"Known: {', '.join(known) or 'none'}."
