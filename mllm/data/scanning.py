"""Parse a JSON file value by value in bounded memory, with the place of every value and the errors of one parse."""

from __future__ import annotations

import hashlib
import json
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from mllm.errors import MLLMError
from mllm.system import open_regular

BLOCK = 2**20  # bytes that are read at once
_NO_KEY = "Expecting property name enclosed in double quotes"
_NEAR = 12  # characters before the end of a block in which what is cut off looks wrong: "tru", "\\u00e"


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of its pairs, for `json`.

    Raises:
        ValueError: it has a key twice, of which one would be lost.
    """
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise twice(next(name for name in names if names.count(name) > 1))
    return content


def twice(name: str) -> ValueError:
    """Return the error of a key that an object has twice."""
    return ValueError(f"an object has the key {name[:60]!r} twice")


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)
_SPACE = re.compile(r"[ \t\n\r]*")
_COMMA = re.compile(r"[ \t\n\r]*,[ \t\n\r]*(?=[^ \t\n\r])")


def not_json(label: str, reason: Exception) -> MLLMError:
    """Return the error of a text that is not JSON, for what the parser raised."""
    if isinstance(reason, RecursionError):
        return MLLMError(f"{label} is not JSON that can be read: it is nested too deeply. Correct the file.")
    return MLLMError(f"{label} is not JSON: {reason}. Is the file complete?")


def not_utf8(file: Path, line: int, byte: int) -> MLLMError:
    """Return the error of a file with a byte that is not UTF-8."""
    return MLLMError(
        f"{file} cannot be read: line {line} has a byte 0x{byte:02x} that is not UTF-8. Is it Latin-1 or another "
        "encoding? Save it as UTF-8."
    )


_scan: Callable[[str, int], tuple[Any, int]] = vars(DECODER)["scan_once"]  # unlike raw_decode, it does not copy


class JsonStream:
    """A JSON file that is parsed from its start to its end.

    A block of it is scanned with a character for each byte (Latin-1), so that places are known without counting; what
    is not ASCII is then parsed again as the UTF-8 that it is.

    Args:
        file: a regular file, not compressed.

    Attributes:
        digest: the hash of the file's bytes so far.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._stream = file, open_regular(file)
        self._first = self._start = len(BOM_UTF8) if self._stream.read(len(BOM_UTF8)) == BOM_UTF8 else 0
        self._stream.seek(self._first)
        self._text, self._at, self._size, self._ended = "", 0, BLOCK, False
        self.digest = hashlib.sha256()

    @property
    def offset(self) -> int:
        """Return the number of bytes before the next value or character."""
        return self._start + self._at

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def peek(self) -> str:
        """Return the next character that is no white space, or an empty text at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def value(self) -> Any:
        """Return the value that comes next, with no white space before it.

        Raises:
            MLLMError: there is none, or it is not JSON.
        """
        self._size = BLOCK
        while True:
            try:
                value, end = _scan(self._text, self._at)
            except StopIteration as error:
                self._read_on("Expecting value", error.value)
            except json.JSONDecodeError as error:
                self._read_on(error.msg, error.pos)
            except (ValueError, RecursionError) as error:
                raise not_json(str(self._file), error) from None
            else:
                if end < len(self._text) or not self._more():  # a number may continue
                    part, self._at = self._text[self._at : end], end
                    return value if part.isascii() else self._parsed(part)

    def _parsed(self, part: str) -> Any:
        """Return the value of a part of the text that is not ASCII."""
        data = part.encode("latin-1")
        try:
            return DECODER.decode(data.decode())
        except UnicodeDecodeError as error:
            line, *_ = self._place(self.offset - len(data) + error.start)
            raise not_utf8(self._file, line, data[error.start]) from None

    def _read_on(self, reason: str, at: int) -> None:
        """Read another block, if what a value lacks may be in it; else raise what is wrong with it."""
        cut_off = reason.startswith("Unterminated") or at >= len(self._text) - _NEAR
        if not (cut_off and self._more()):
            self._fail(reason, at)

    def elements(self) -> Iterator[tuple[int, Any]]:
        """Yield the values of the list that comes next, each with its offset; ``offset`` is its end then."""
        more = self._opened("]")
        while more:
            start = self.offset
            yield start, self.value()
            more = self._continued("]")

    def members(self) -> Iterator[tuple[int, str]]:
        """Yield the keys of the object that comes next, with their offsets; each value must be read before the next."""
        keys: set[str] = set()
        more = self._opened("}")
        while more:
            start = self.offset
            if self.peek() != '"':
                self._fail(_NO_KEY, self._at)
            key = self.value()
            if key in keys:
                raise not_json(str(self._file), twice(key))
            keys.add(key)
            if self.peek() != ":":
                self._fail("Expecting ':' delimiter", self._at)
            self._at += 1
            self.peek()
            yield start, key
            more = self._continued("}")

    def skip(self) -> None:
        """Read the next value without keeping it; of a list, one element at a time."""
        if self.peek() == "[":
            for _ in self.elements():
                pass
        else:
            self.value()

    def end(self) -> None:
        """Check that nothing follows.

        Raises:
            MLLMError: something does.
        """
        if self.peek():
            self._fail("Extra data", self._at)

    def _opened(self, closing: str) -> bool:
        """Read the character that opens a list or an object; whether it has a part."""
        self.peek()
        self._at += 1
        return not self._closed(closing)

    def _continued(self, closing: str) -> bool:
        """Read what follows a part of a list or an object; whether another part does."""
        comma = _COMMA.match(self._text, self._at)
        if comma is None:  # the end, another character, or the end of a block
            if self._closed(closing):
                return False
            if self.peek() != ",":
                self._fail("Expecting ',' delimiter", self._at)
            self._at += 1
            self.peek()
        else:
            self._at = comma.end()
        if self._text[self._at : self._at + 1] == closing:
            self._fail("Expecting value" if closing == "]" else _NO_KEY, self._at)
        return True

    def _closed(self, closing: str) -> bool:
        if self.peek() != closing:
            return False
        self._at += 1
        return True

    def _more(self) -> bool:
        """Read another block, and forget the text before the next value; whether there was more."""
        if self._ended:
            return False
        data = self._stream.read(self._size)
        self._size *= 2  # for a long value, which is parsed again
        self._ended = not data
        self.digest.update(data)
        self._start += self._at
        self._text, self._at = self._text[self._at :] + data.decode("latin-1"), 0
        return True

    def _fail(self, reason: str, at: int) -> NoReturn:
        """Raise the error that parsing the whole text would."""
        line, column, place = self._place(self._start + at)
        raise not_json(str(self._file), ValueError(f"{reason}: line {line} column {column} (char {place})"))

    def _place(self, offset: int) -> tuple[int, int, int]:
        """Return the line and the column of a byte, counted from 1, and its character, from 0."""
        number = column = place = 0
        left = offset - self._first
        self._stream.seek(self._first)
        for number, line in enumerate(self._stream, start=1):
            column = len(line[:left].decode(errors="replace").replace("\r\n", "\n"))
            if left < len(line) or not line.endswith(b"\n"):
                return number, column + 1, place + column
            left, place = left - len(line), place + column
        return number + 1, 1, place
