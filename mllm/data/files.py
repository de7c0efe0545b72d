"""What readers share: files that are opened, parsed and checked with messages that name the file and the row."""

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
        MLLMError: it is not there, or is no text.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MLLMError(f"{file} cannot be read: {error}") from None


def json_of(file: Path) -> Any:
    """Return a JSON file's content.

    Raises:
        MLLMError: it cannot be read, or was written by half.
    """
    return parsed(text_of(file), str(file))


def json_lines(file: Path) -> list[Any]:
    """Return the rows of a file with a JSON value a line; empty lines are passed over.

    Raises:
        MLLMError: it cannot be read, or a line is not JSON.
    """
    lines = text_of(file).split("\n")
    return [parsed(line, f"{file}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def parsed(text: str, where: str) -> Any:
    """Return a JSON text's value."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise MLLMError(f"{where} is not JSON: {error}") from None


@contextlib.contextmanager
def form(label: Any, expected: str) -> Iterator[None]:
    """Turn what is raised over content of another form into one message with what was expected."""
    try:
        yield
    except MLLMError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise MLLMError(f"{label} is of another form ({error!r}): expected {expected}.") from None


def texts(value: Any) -> list[str]:
    """Return a text or a list of texts as a list, without empty ones."""
    found = [str(text).strip() for text in (value if isinstance(value, list) else [value]) if text is not None]
    return [text for text in found if text]


def inside(folder: Path | str, name: str, label: Any) -> Path:
    """Return ``folder/name``, which must be inside ``folder``: a data file does not choose what else is read."""
    path = Path(os.path.normpath(Path(folder) / name))
    if not path.is_relative_to(os.path.normpath(folder)):
        raise MLLMError(f"{label}: the picture {name!r} is outside of {folder}. Set 'images' to a folder that has it.")
    return path


def present(items: list[Item], label: Any) -> list[Item]:
    """Return the items, of which there are some and all of whose files are there."""
    paths = {image.path for item in items for image in item.images if isinstance(image, ImageFile)}
    missing = sorted(str(path) for path in paths if not path.is_file())
    if missing:
        raise MLLMError(
            f"{label}: {len(missing)} of {len(paths)} pictures are not there: {some(missing)}. "
            "Put them there, or take their rows out."
        )
    if not items:
        raise MLLMError(f"{label} holds no items.")
    return items


def some(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
