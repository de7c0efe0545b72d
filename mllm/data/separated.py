"""Read CSV and TSV files strictly: quotes are balanced, and every row has as many fields as the header."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mllm.data.files import text_of
from mllm.data.records import Record
from mllm.errors import MLLMError
from mllm.media.images import SUFFIXES

IMAGE = "image"


class _Lines:
    """The lines of a text, read one after another from any position."""

    def __init__(self, text: str) -> None:
        self.lines = list(io.StringIO(text))
        self.position = 0

    def __iter__(self) -> Iterator[str]:
        while self.position < len(self.lines):
            self.position += 1
            yield self.lines[self.position - 1]


def separated_rows(file: Path, delimiter: str) -> Iterator[Record]:
    """Yield the rows of a table with a header, as ``{column: field}``.

    After a row whose quotes are not balanced the next line is read as a row, so that no other row is lost with it.
    A quoted field may contain line breaks, unless a later line of it is a row of its own. Rows without any text are
    left out.

    Raises:
        MLLMError: the file cannot be read, or its header has unbalanced quotes or a name twice.
    """
    lines = _Lines(text_of(file))
    header: list[str] | None = None
    number = 0
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while lines.position < len(lines.lines):
        start = lines.position
        fields: list[str] = []
        problem = ""
        try:
            fields = next(reader, [])
            problem = _swallowed(lines.lines[start + 1 : lines.position], header, delimiter) if header else ""
        except csv.Error as error:
            problem = f'{error}. Close every quoted field, and write " inside of it as ""'
        if problem:
            lines.position = start + 1
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
        elif not any(field.strip() for field in fields):
            continue
        if header is None:
            header = _header(fields, problem, file)
            continue
        number += 1
        yield Record(f"{file}, row {number}", number, _loader(header, fields, problem, start + 1))


def _header(fields: list[str], problem: str, file: Path) -> list[str]:
    names = [field.strip() for field in fields]
    twice = [name for name, times in Counter(names).items() if times > 1 and name]
    if twice:
        problem = f"the column {twice[0]!r} is there twice"
    if problem:
        raise MLLMError(f"{file} is not a table: {problem}. Expected a header such as 'image,caption'. Correct it.")
    return names


def _swallowed(later: list[str], header: list[str], delimiter: str) -> str:
    """Return what is wrong with a row that continues in ``later`` lines, if one of them is a row of its own."""
    if not later or IMAGE not in header:
        return ""
    for offset, fields in enumerate(csv.reader(later, delimiter=delimiter), start=1):
        if len(fields) == len(header) and Path(fields[header.index(IMAGE)].strip()).suffix.lower() in SUFFIXES:
            return f'a field that " opens contains line {offset} after it, which is a row. Close it, or write " as ""'
    return ""


def _loader(header: list[str], fields: list[str], problem: str, line: int) -> Any:
    def load() -> dict[str, str]:
        if problem:
            raise MLLMError(f"{problem} (line {line}).")
        if len(fields) != len(header):
            raise MLLMError(
                f"{len(fields)} fields (line {line}), but the header has {len(header)}: {', '.join(header)[:80]}. "
                "Write every field, and quote one that contains the delimiter."
            )
        return dict(zip(header, fields, strict=True))

    return load
