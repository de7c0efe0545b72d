"""Open and parse the files of the readers, compressed or not, into rows with names for messages."""

from __future__ import annotations

import bz2
import codecs
import functools
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mllm.data import stored
from mllm.data.records import Held, Records
from mllm.data.scanning import DECODER, not_json, not_utf8
from mllm.data.stored import StoredJson, StoredLines
from mllm.data.values import text_in
from mllm.errors import MLLMError
from mllm.media.images import SUFFIXES
from mllm.system import is_hidden, open_regular, read_regular

COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
REFUSED = (".zst", ".zip", ".lz4", ".7z", ".rar", ".tgz")  # files that must be unpacked first
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what opening or decompressing a file raises
_UTF_16_OR_32 = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")  # byte order marks


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
    if _is_utf_16_or_32(data):
        raise MLLMError(f"{file} cannot be read: it is UTF-16 or UTF-32, not UTF-8. Save it as UTF-8.")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise not_utf8(file, line, data[error.start]) from None


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
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise not_json(label, error) from None


def is_large(*files: Path) -> bool:
    """Return whether the rows of files are read when they are needed, instead of held in memory."""
    if not all(suffix_of(file) == file.suffix.lower() not in REFUSED and os.path.isfile(file) for file in files):
        return False
    large = sum(os.path.getsize(file) for file in files) >= stored.HELD
    return large and not any(_is_utf_16_or_32(_head(file)) for file in files)


def records_of(file: Path, *others: Path) -> Records:
    """Return the rows of a JSON Lines file, or of a file that holds one JSON list; ``others`` are read with it."""
    if is_large(file, *others):
        is_list = _head(file).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        return _stored_list(file, "a list of rows", None) if is_list else StoredLines(file, parse_json)
    text = text_of(file)
    if text.lstrip().startswith("["):
        return rows_in(parse_json(text, str(file)), file, "a list of rows")
    return _held_lines(text, file, parse_json)


def lines_of(file: Path) -> Records:
    """Return the lines of a text file that are not empty."""
    return StoredLines(file, str) if is_large(file) else _held_lines(text_of(file), file, str)


def _held_lines(text: str, file: Path, load: Callable[[str], Any]) -> Records:
    lines = list(_lines(text))
    return Held([line for _, line in lines], lambda index: f"{file}, line {lines[index][0]}", load)


def rows_of(file: Path | str, expected: str, key: str | None = None) -> Records:
    """Return the rows of a JSON file: of its list, or of the list under a key of its object.

    Raises:
        MLLMError: it cannot be read, or there is no such list. Of a large file that is known when its rows are read.
    """
    if is_large(Path(file)):
        return _stored_list(Path(file), expected, key)
    return rows_in(json_of(Path(file)), file, expected, key)


def _stored_list(file: Path, expected: str, key: str | None) -> Records:
    return StoredJson(file, "list", key, lambda: _refuse(file, "list of rows", expected))


def rows_in(content: Any, file: Any, expected: str, key: str | None = None) -> Records:
    """Return the rows of a list, or of the list under a key of an object.

    Raises:
        MLLMError: there is no such list.
    """
    rows = content if key is None else content.get(key) if isinstance(content, dict) else None
    if not isinstance(rows, list):
        _refuse(file, "list of rows", expected)
    label = f"{file}, {key}, row" if key else f"{file}, row"
    return Held(rows, lambda index: f"{label} {index + 1}")


def entries_of(file: Path | str, expected: str) -> Records:
    """Return the entries of a JSON file's object as rows ``(key, value)``.

    Raises:
        MLLMError: it cannot be read, or is no object. Of a large file that is known when its rows are read.
    """
    if is_large(Path(file)):
        return StoredJson(Path(file), "entries", None, lambda: _refuse(file, "object", expected))
    content = json_of(Path(file))
    if not isinstance(content, dict):
        _refuse(file, "object", expected)
    entries = list(content.items())
    return Held(entries, lambda index: f"{file}, entry {entries[index][0]!r}")


def _refuse(file: Any, what: str, expected: str) -> NoReturn:
    raise MLLMError(f"{file} has an unexpected form: it is no {what}; expected {expected}. Correct the file.")


def _head(file: Path) -> bytes:
    with open_regular(file) as stream:
        return stream.read(4096)


def _is_utf_16_or_32(head: bytes) -> bool:
    return head.startswith(_UTF_16_OR_32) or b"\0" in head[:4]


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
    if os.sep == "/" and _plain(name):
        return Path(os.path.join(_normal(str(folder)), name))
    root = _absolute(str(folder), os.getcwd())
    if not os.path.normpath(os.path.join(root, name)).startswith(os.path.join(root, "")):
        raise MLLMError(f"the image {name[:200]!r} is outside of {folder}. Set 'images' to a folder that contains it.")
    return Path(os.path.normpath(os.path.join(folder, name)))


def _plain(name: str) -> bool:
    """Return whether a name is a relative path in its normal form: what most rows have."""
    return not ("//" in name or "/." in name or name.startswith((".", "/")) or name.endswith("/"))


@functools.cache
def _normal(folder: str) -> str:
    return os.path.normpath(folder)


@functools.cache
def _absolute(folder: str, working: str) -> str:
    return os.path.normpath(os.path.join(working, folder))


def some(names: Sequence[str]) -> str:
    """Return the first three names, and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
