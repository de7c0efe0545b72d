"""Check the values of a row: texts, captions, answers and ids. Messages name neither file nor row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mllm.errors import MLLMError
from mllm.system import checked_text


def text_in(value: Any, what: str, *, numbers: bool = False, empty: bool = False) -> str:
    """Return a value that is a text, unchanged.

    Args:
        value: the value.
        what: its name, for messages.
        numbers: a finite number is a text, too.
        empty: an empty text, and null for it, are allowed.

    Raises:
        MLLMError: it is a truth value, NaN, a list or a mapping; it is empty; or it has characters that are no text.
    """
    if isinstance(value, str) and value.isascii() and "\0" not in value and value and not value.isspace():
        return value  # as almost all are
    if value is None and empty:
        return ""
    if numbers and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if not isinstance(value, str):
        raise MLLMError(f"the {what} is {_shown(value)}; expected a text. Correct it.")
    if not empty and not value.strip():
        raise MLLMError(f"the {what} is empty; expected a text. Write one, or remove the row.")
    if "\0" in value or not (value.isascii() or _encodable(value)):
        raise MLLMError(f"the {what} {_shown(value)} has a NUL or half a character; expected a text. Correct it.")
    return value


def captions_in(value: Any) -> list[str]:
    """Return one caption, or a list of captions, stripped; null is an empty caption."""
    return [text_in(caption, "caption", empty=True).strip() for caption in listed(value)]


def answers_in(value: Any) -> list[str]:
    """Return one answer, or a list of answers, stripped; an answer may be a number, and null is an empty one."""
    return [text_in(answer, "answer", numbers=True, empty=True).strip() for answer in listed(value)]


def reference_answers(values: Any) -> tuple[str, ...]:
    """Return all annotators' answers unchanged, some of which may be empty, since metrics count annotators.

    Raises:
        MLLMError: the values are no list of texts or numbers, or all are empty.
    """
    if not isinstance(values, list):
        raise MLLMError(f"the answers are {_shown(values)}; expected a list. Correct them.")
    answers = tuple(text_in(answer, "answer", numbers=True, empty=True) for answer in values)
    if not any(answer.strip() for answer in answers):
        raise MLLMError("all answers are empty; expected at least one text. Write one, or remove the row.")
    return answers


def listed(value: Any) -> Sequence[Any]:
    """Return a list, or a single value as a list."""
    return value if isinstance(value, list) else [value]


def identifier(value: Any) -> str:
    """Return an id, a text or a whole number, as a text.

    Raises:
        MLLMError: it is something else.
    """
    if isinstance(value, float) and value.is_integer():  # pandas makes ids of a column with gaps floats
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise MLLMError(f"the id is {_shown(value)}; expected a text or a whole number. Correct it.")
    return str(value)


def absent(value: Any) -> bool:
    """Return whether a cell of a table is empty: null, NaN as pandas writes it, blank, or an empty list."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _encodable(text: str) -> bool:
    """Return whether a text has no surrogates, which JSON can escape and UTF-8 cannot encode."""
    try:
        checked_text(text)
    except MLLMError:
        return False
    return True


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
