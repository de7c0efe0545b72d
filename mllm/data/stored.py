"""Read the rows of large files at their places: found once, when the rows are first read, one after another.

All processes of a machine read a row from the same pages of the file, which the operating system keeps.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from mllm.data.records import Record, Records
from mllm.data.scanning import DECODER, JsonStream, not_utf8
from mllm.errors import MLLMError
from mllm.system import open_regular

HELD = 16 * 2**20  # bytes: the rows of a smaller file are held in memory, which takes about ten times as much


class Stored(Records):
    """Rows of a large file, which are read at their places: found when the rows are first read, one after another."""

    stored = True

    def __init__(self, file: Path, name: Path | str | None = None) -> None:
        self._file, self._name = file, str(name or file)
        self._starts, self._ends, self._digest = array("q"), array("q"), ""
        self._state = _state(os.stat(file))

    def __len__(self) -> int:
        return len(self._starts)

    def identity(self) -> str:
        """Return a hash of the file's bytes."""
        return self._digest

    def __iter__(self) -> Iterator[Record]:
        if self._digest:
            yield from super().__iter__()
            return
        self._starts, self._ends = array("q"), array("q")
        for start, end, record in self._scan():
            self._starts.append(start)
            self._ends.append(end)
            yield record

    def _scan(self) -> Iterator[tuple[int, int, Record]]:
        """Yield each row with its place, and set the digest in the end."""
        raise NotImplementedError

    def _text(self, index: int) -> str:
        """Return the text of a row.

        Raises:
            MLLMError: the file cannot be read, or was changed since its rows were found.
        """
        start, end = self._starts[index], self._ends[index]
        try:
            with open_regular(self._file) as file:
                same = _state(os.fstat(file.fileno())) == self._state
                file.seek(start)
                data = file.read(end - start)
        except OSError as error:
            raise MLLMError(f"{self._name} cannot be read: {error.strerror or error}.") from None
        if not same:
            raise MLLMError(f"{self._name} was changed since it was read. Start again with the file as it is now.")
        return data.decode()


class StoredJson(Stored):
    """The rows of a large JSON file: the elements of its list, or of the list under a key, or an object's entries.

    Args:
        file: the file.
        form: which of them.
        key: of the list.
        refuse: raises the error of a file of another form.
    """

    def __init__(
        self, file: Path, form: Literal["list", "entries"], key: str | None, refuse: Callable[[], Any]
    ) -> None:
        super().__init__(file)
        self._form, self._key, self._refuse = form, key, refuse

    def at(self, index: int) -> Record:
        """Return a row, read now."""
        text = self._text(index)
        if self._form == "entries":
            (entry,) = DECODER.decode(f"{{{text}}}").items()
            return self._entry(index, entry)
        return self._row(index, DECODER.decode(text))

    def _row(self, index: int, value: Any) -> Record:
        part = "" if self._key is None else f" {self._key},"
        return Record(f"{self._name},{part} row {index + 1}", index + 1, lambda: value)

    def _entry(self, index: int, entry: tuple[str, Any]) -> Record:
        return Record(f"{self._name}, entry {entry[0]!r}", index + 1, lambda: entry)

    def _scan(self) -> Iterator[tuple[int, int, Record]]:
        stream = JsonStream(self._file)
        try:
            if self._form == "entries":
                if stream.peek() != "{":
                    self._refuse()
                for index, (start, key) in enumerate(stream.members()):
                    value = stream.value()
                    yield start, stream.offset, self._entry(index, (key, value))
            elif self._key is None:
                yield from self._rows(stream)
            else:
                yield from self._rows_under(stream, self._key)
            stream.end()
            self._digest = stream.digest.hexdigest()
        finally:
            stream.close()

    def _rows(self, stream: JsonStream) -> Iterator[tuple[int, int, Record]]:
        if stream.peek() != "[":
            self._refuse()
        for index, (start, value) in enumerate(stream.elements()):
            yield start, stream.offset, self._row(index, value)

    def _rows_under(self, stream: JsonStream, wanted: str) -> Iterator[tuple[int, int, Record]]:
        known = False
        if stream.peek() != "{":
            self._refuse()
        for _, key in stream.members():
            if key == wanted:
                known = True
                yield from self._rows(stream)
            else:
                stream.skip()
        if not known:
            self._refuse()


class StoredLines(Stored):
    """The lines of a large text file that are not empty, parsed or as texts.

    Args:
        file: the file.
        load: parses a line.
    """

    def __init__(self, file: Path, load: Callable[[str], Any]) -> None:
        super().__init__(file)
        self._load, self._lines = load, array("q")

    def at(self, index: int) -> Record:
        """Return a row, read now."""
        return self._record(index, self._text(index))

    def _record(self, index: int, text: str) -> Record:
        return Record(f"{self._name}, line {self._lines[index]}", index + 1, lambda: self._load(text))

    def _scan(self) -> Iterator[tuple[int, int, Record]]:
        digest = hashlib.sha256()
        self._lines = array("q")
        with open_regular(self._file) as file:
            for number, (start, end, line) in enumerate(_lines(_hashed(file, digest)), start=1):
                try:
                    text = line.decode()
                except UnicodeDecodeError as error:
                    raise not_utf8(self._file, number, line[error.start]) from None
                if text.strip():
                    self._lines.append(number)
                    yield start, end, self._record(len(self._lines) - 1, text)
        self._digest = digest.hexdigest()


def _hashed(file: Iterable[bytes], digest: Any) -> Iterator[bytes]:
    for line in file:
        digest.update(line)
        yield line


def _lines(file: Iterable[bytes]) -> Iterator[tuple[int, int, bytes]]:
    """Yield the lines of a file with their places; they end with a line feed, a carriage return, or both."""
    start = 0
    for whole in file:
        end = start + len(whole)
        line = whole.removesuffix(b"\n")
        line = line.removesuffix(b"\r") if len(line) < len(whole) else line
        if not start and line.startswith(b"\xef\xbb\xbf"):
            start, line = 3, line[3:]
        for part in line.split(b"\r"):
            yield start, start + len(part), part
            start += len(part) + 1
        start = end


def _state(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
