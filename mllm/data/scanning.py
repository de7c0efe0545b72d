"""Parse a JSON file value by value in bounded memory, with the place of every value and the errors of one parse."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from mllm.errors import MLLMError
from mllm.system import open_regular

BLOCK = 4 * 2**20  # bytes that are read at once
_BOM = codecs.BOM_UTF8
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
        refuse_twice(next(name for name in names if names.count(name) > 1))
    return content


def refuse_twice(name: str) -> NoReturn:
    """Raise the ``ValueError`` of a key that an object has twice."""
    raise ValueError(f"an object has the key {name[:60]!r} twice")


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)
_SPACE = re.compile(r"[ \t\n\r]*")


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

    Args:
        file: a regular file, not compressed.

    Attributes:
        offset: the bytes before the next value or sign.
        digest: the hash of the file's bytes so far.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._stream = file, open_regular(file)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at = "", 0
        self._size, self._ended = BLOCK, False
        self._chars = self._lines = self._line_start = 0  # of what is no longer in the text
        self.offset, self.digest = 0, hashlib.sha256()
        if self._stream.read(len(_BOM)) == _BOM:
            self.offset = len(_BOM)
            self.digest.update(_BOM)
        self._stream.seek(self.offset)

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def peek(self) -> str:
        """Return the next sign that is no white space, or an empty text at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            self._advance(match.end() if match else self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def value(self) -> Any:
        """Return the next value.

        Raises:
            MLLMError: there is none, or it is not JSON.
        """
        self.peek()
        self._size = BLOCK
        while True:
            problem: json.JSONDecodeError | None = None
            try:
                value, end = _scan(self._text, self._at)
            except StopIteration as error:
                problem = json.JSONDecodeError("Expecting value", self._text, error.value)
            except json.JSONDecodeError as error:
                problem = error
            except (ValueError, RecursionError) as error:
                raise not_json(str(self._file), error) from None
            if problem is None:
                if end == len(self._text) and self._more():  # a number may go on
                    continue
                self._advance(end)
                return value
            open_end = problem.msg.startswith("Unterminated") or problem.pos >= len(self._text) - _NEAR
            if not (open_end and self._more()):
                self._fail(problem.msg, problem.pos)

    def elements(self) -> Iterator[tuple[int, Any]]:
        """Yield the values of the list that comes next, each with its offset; ``offset`` is its end then."""
        for _ in self._separated("[", "]"):
            start = self.offset
            yield start, self.value()

    def members(self) -> Iterator[tuple[int, str]]:
        """Yield the keys of the object that comes next, with their offsets; each value must be read before the next."""
        keys: set[str] = set()
        for sign in self._separated("{", "}"):
            start = self.offset
            if sign != '"':
                self._fail(_NO_KEY, self._at)
            key = self.value()
            if key in keys:
                try:
                    refuse_twice(key)
                except ValueError as error:
                    raise not_json(str(self._file), error) from None
            keys.add(key)
            if self.peek() != ":":
                self._fail("Expecting ':' delimiter", self._at)
            self._advance(self._at + 1)
            self.peek()
            yield start, key

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

    def _separated(self, opening: str, closing: str) -> Iterator[str]:
        """Yield the first sign of each part of a list or object, which must be read before the next."""
        assert self.peek() == opening
        self._advance(self._at + 1)
        sign = self.peek()
        while sign != closing:
            yield sign
            sign = self.peek()
            if sign == ",":
                self._advance(self._at + 1)
                sign = self.peek()
                if sign != closing:
                    continue
                self._fail("Expecting value" if closing == "]" else _NO_KEY, self._at)
            if sign != closing:
                self._fail("Expecting ',' delimiter", self._at)
        self._advance(self._at + 1)

    def _advance(self, at: int) -> None:
        part = self._text[self._at : at]
        self.offset += len(part) if part.isascii() else len(part.encode("utf-8", "surrogatepass"))
        self._at = at

    def _more(self) -> bool:
        """Read another block, and forget the text before the next value; whether there was more."""
        if self._ended:
            return False
        gone = self._text[: self._at]
        self._lines += gone.count("\n")
        self._line_start = self._chars + gone.rindex("\n") + 1 if "\n" in gone else self._line_start
        self._chars += len(gone) - gone.count("\r\n")
        data = self._stream.read(self._size)
        self._size *= 2  # for a long value, which is parsed again
        self._ended = not data
        self.digest.update(data)
        try:
            more = self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            text = self._text[self._at :] + error.object[: error.start].decode()
            line = self._lines + text.count("\n") + 1
            raise not_utf8(self._file, line, error.object[error.start]) from None
        self._text, self._at = self._text[self._at :] + more, 0
        return True

    def _fail(self, reason: str, at: int) -> NoReturn:
        """Raise the error that parsing the whole text would."""
        before = self._text[:at]
        line = self._lines + before.count("\n") + 1
        place = self._chars + at - before.count("\r\n")
        start = self._chars + before.rindex("\n") + 1 - before.count("\r\n") if "\n" in before else self._line_start
        raise not_json(str(self._file), ValueError(f"{reason}: line {line} column {place - start + 1} (char {place})"))
