"""Open, parse and check the files of the readers, with messages that name the file and the row."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.media.images import ImageFile


def text_of(file: Path) -> str:
    """Return a file's text.

    Raises:
        MLLMError: it does not exist, or is not UTF-8 text.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MLLMError(f"{file} cannot be read: {error}. Give a file of UTF-8 text.") from None


def json_of(file: Path) -> Any:
    """Return the value of a JSON file.

    Raises:
        MLLMError: it cannot be read, or is not JSON.
    """
    return parse_json(text_of(file), str(file))


def json_lines(file: Path) -> list[Any]:
    """Return the values of a JSON Lines file; empty lines are skipped.

    Raises:
        MLLMError: it cannot be read, or a line is not JSON.
    """
    lines = text_of(file).split("\n")
    return [parse_json(line, f"{file}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def parse_json(text: str, label: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        MLLMError: it is not JSON.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise MLLMError(f"{label} is not JSON: {error}. Is the file complete?") from None


@contextlib.contextmanager
def expect_form(label: Any, expected: str) -> Iterator[None]:
    """Turn the exceptions that content of an unexpected form raises into a message with the expected form."""
    try:
        yield
    except MLLMError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise MLLMError(f"{label} has an unexpected form ({error!r}): expected {expected}. Correct the file.") from None


def texts(value: Any) -> list[str]:
    """Return a text, or a list of texts, as a list of stripped texts without empty ones."""
    stripped = [str(text).strip() for text in (value if isinstance(value, list) else [value]) if text is not None]
    return [text for text in stripped if text]


def inside(folder: Path | str, name: str, label: Any) -> Path:
    """Return ``folder/name``, which must be inside ``folder``, so that a data file cannot make other files be read.

    Raises:
        MLLMError: it is outside of ``folder``.
    """
    path = Path(os.path.normpath(Path(folder) / name))
    if not path.is_relative_to(os.path.normpath(folder)):
        raise MLLMError(
            f"{label}: the image {name!r} is outside of {folder}. Set 'images' to a folder that contains it."
        )
    return path


def check_present(items: list[Item], label: Any) -> list[Item]:
    """Return the items after checking that there are some and that all their image files exist.

    Raises:
        MLLMError: there are no items, or image files are missing.
    """
    paths = {image.path for item in items for image in item.images if isinstance(image, ImageFile)}
    missing = sorted(str(path) for path in paths if not path.is_file())
    if missing:
        raise MLLMError(
            f"{label}: {len(missing)} of {len(paths)} images are missing: {some(missing)}. "
            "Add the files, or remove their rows."
        )
    if not items:
        raise MLLMError(f"{label} contains no items: expected at least one. Give another file or split.")
    return items


def some(names: Sequence[str]) -> str:
    """Return the first three names, and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
