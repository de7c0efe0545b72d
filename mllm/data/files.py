"""Open and parse the files of the readers, compressed or not, into rows with names for messages."""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mllm.data.values import text_in
from mllm.errors import MLLMError
from mllm.media.images import SUFFIXES
from mllm.system import is_hidden, read_regular

COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
REFUSED = (".zst", ".zip", ".lz4", ".7z", ".rar", ".tgz")  # files that must be unpacked first
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what opening or decompressing a file raises
FORM_ERRORS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)  # of a value of another form
_UTF_16_OR_32 = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")  # byte order marks


class Record(NamedTuple):
    """A row of a file, which is parsed when it is needed, so that each row has an error of its own."""

    label: str  # the file and the row, for messages
    number: int  # counted from 1
    load: Callable[[], Any]


def bytes_of(file: Path) -> bytes:
    """Return a file's bytes, decompressed if its name ends in ``.gz``, ``.bz2`` or ``.xz``.

    Raises:
        MLLMError: it does not exist, is a folder, a pipe or a device, is damaged, or is compressed in another way.
    """
    check_regular(file)
    if file.suffix.lower() in REFUSED:
        raise MLLMError(f"{file} cannot be read: files ending in {file.suffix} are not unpacked here. Unpack it first.")
    try:
        data = read_regular(file)
        if (opener := COMPRESSED.get(file.suffix.lower())) is not None:
            with opener(io.BytesIO(data)) as stream:
                data = stream.read()
    except DAMAGED as error:
        raise MLLMError(f"{file} cannot be read: {error}. Is the file complete?") from None
    return data


def check_regular(file: Path) -> None:
    """Check that a path is a file that has an end, not a folder, a pipe or a device.

    Raises:
        MLLMError: it is not.
    """
    if not os.path.isfile(file):
        what = "it is no regular file" if os.path.lexists(file) else "no such file"
        raise MLLMError(f"{str(file)[:200]} cannot be read: {what}. Give the path of a file.")


def suffix_of(file: Path) -> str:
    """Return a file's suffix in lower case, without that of its compression: ``.csv`` for ``a.CSV.gz``."""
    return (Path(file.stem) if file.suffix.lower() in COMPRESSED else file).suffix.lower()


def stem_of(file: Path) -> str:
    """Return a file's name without its suffix and that of its compression."""
    return Path(file.stem).stem if file.suffix.lower() in COMPRESSED else file.stem


def files_in(folder: Path, *suffixes: str) -> list[Path]:
    """Return the files of a folder with one of these suffixes, compressed or not, by name, without hidden ones."""
    return [path for path in visible_in(folder) if suffix_of(path) in suffixes]


def images_in(folder: Path, *, deep: bool = False) -> list[Path]:
    """Return the image files of a folder, with its subfolders if ``deep``, by name, without hidden ones."""
    return [path for path in visible_in(folder, deep=deep) if path.suffix.lower() in SUFFIXES]


def visible_in(folder: Path, *, deep: bool = False) -> list[Path]:
    """Return all files and folders in a folder that are not hidden, by name.

    Raises:
        MLLMError: there is no such folder.
    """
    if not os.path.isdir(folder):
        raise MLLMError(f"{str(folder)[:200]} is no folder. Give the path of a folder.")
    paths = sorted(folder.rglob("*") if deep else folder.glob("*"))
    return [path for path in paths if not is_hidden(path.relative_to(folder))]


def text_of(file: Path) -> str:
    """Return a file's text, with line feeds as its line ends.

    Raises:
        MLLMError: it cannot be read, or is not UTF-8 text.
    """
    data = bytes_of(file)
    if data.startswith(_UTF_16_OR_32) or b"\0" in data[:4]:
        raise MLLMError(f"{file} cannot be read: it is UTF-16 or UTF-32, not UTF-8. Save it as UTF-8.")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise MLLMError(
            f"{file} cannot be read: line {line} has a byte 0x{data[error.start]:02x} that is not UTF-8. Is it Latin-1 "
            "or another encoding? Save it as UTF-8."
        ) from None


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
    return [parse_json(line, f"{file}, line {number}") for number, line in _lines(text_of(file))]


def parse_json(text: str, label: str = "it") -> Any:
    """Return the value of a JSON text.

    Raises:
        MLLMError: it is not JSON, or an object has a key twice, of which one would be lost.
    """
    if not text.strip():
        raise MLLMError(f"{label} is not JSON: it is empty. Is the file complete?")
    try:
        return json.loads(text, object_pairs_hook=_object)
    except ValueError as error:
        raise MLLMError(f"{label} is not JSON: {error}. Is the file complete?") from None
    except RecursionError:
        raise MLLMError(f"{label} is not JSON that can be read: it is nested too deeply. Correct the file.") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {twice[:60]!r} twice")
    return content


def records_of(file: Path) -> Iterator[Record]:
    """Yield the rows of a JSON Lines file, or of a file that holds one JSON list."""
    text = text_of(file)
    if text.lstrip().startswith("["):
        yield from rows_of(parse_json(text, str(file)), file, "a list of rows")
        return
    for number, (line, content) in enumerate(_lines(text), start=1):
        yield Record(f"{file}, line {line}", number, lambda content=content: parse_json(content))  # type: ignore[misc]


def rows_of(content: Any, file: Any, expected: str, key: str | None = None) -> Iterator[Record]:
    """Return the rows of a list, or of the list under a key of an object.

    Raises:
        MLLMError: there is no such list.
    """
    rows = content if key is None else content.get(key) if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise MLLMError(f"{file} has an unexpected form: it is no list of rows; expected {expected}. Correct the file.")
    label = f"{file}, {key}, row" if key else f"{file}, row"
    return (Record(f"{label} {number}", number, lambda row=row: row) for number, row in enumerate(rows, start=1))  # type: ignore[misc]


def entries_of(content: Any, file: Any, expected: str) -> Iterator[Record]:
    """Return the entries of an object as rows ``(key, value)``.

    Raises:
        MLLMError: it is no object.
    """
    if not isinstance(content, dict):
        raise MLLMError(f"{file} has an unexpected form: it is no object; expected {expected}. Correct the file.")
    return (
        Record(f"{file}, entry {entry[0]!r}", number, lambda entry=entry: entry)  # type: ignore[misc]
        for number, entry in enumerate(content.items(), start=1)
    )


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not empty with their numbers; a line ends with a line feed only."""
    return ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def inside(folder: Path | str, name: Any) -> Path:
    """Return ``folder/name``, which must be inside ``folder``, so that a data file cannot make other files be read.

    Raises:
        MLLMError: it is outside of ``folder``, an address, or no text.
    """
    name = text_in(name, "image's file name")
    if name.startswith(("http://", "https://", "s3://", "gs://")):
        raise MLLMError(f"the image {name[:200]!r} is an address, and nothing is downloaded. Give a file.")
    root = _absolute(str(folder), os.getcwd())
    if not os.path.normpath(os.path.join(root, name)).startswith(os.path.join(root, "")):
        raise MLLMError(f"the image {name[:200]!r} is outside of {folder}. Set 'images' to a folder that contains it.")
    return Path(os.path.normpath(os.path.join(folder, name)))


@functools.cache
def _absolute(folder: str, working: str) -> str:
    return os.path.normpath(os.path.join(working, folder))


def some(names: Sequence[str]) -> str:
    """Return the first three names, and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
