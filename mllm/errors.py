"""The one exception a user can cause, and the near-match help its messages carry."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class MLLMError(ValueError):
    """Something the user can mend: the message says what was wrong, what was expected, and what to do.

    The command line prints it and exits with status 1; a traceback is shown with ``--debug`` only.
    """


def near(name: str, known: Iterable[str]) -> str:
    """Return the sentence that helps with an unknown ``name``: the near matches, else all that is known."""
    known = sorted(known)
    matches = get_close_matches(name, known, n=3, cutoff=0.5)
    if matches:
        return f"Did you mean {' or '.join(repr(match) for match in matches)}?"
    return f"Known: {', '.join(known) or 'none'}."
