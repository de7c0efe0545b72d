"""Write files whole or not at all, read files that have an end, lock folders, and keep freed memory in the process.

The C library returns large buffers to the kernel as soon as they are free, and every step of a model asks for the same
ones again: on a CPU the page faults of this took most of a convolutional encoder's time (measured: 40 ms an image
against 12 ms, batches of 32, two cores). In one heap they leave gaps, so the largest are on huge pages.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import platform
import re
import stat
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mllm.errors import MLLMError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_PARTIAL = re.compile(r"\..+\.[a-z0-9_]{8}")  # the names of files that are being written


def write(path: Path, action: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all: it is written beside its path and moved there."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    beside = Path(name)
    try:
        action(beside)
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def remove_partial(folder: Path, *, older_than: float = 0.0) -> None:
    """Remove files that a killed process was writing to a folder.

    Args:
        folder: nothing else writes to it, or see the next argument.
        older_than: seconds since they were last written; another process may be writing younger ones.
    """
    for path in folder.glob(".*"):
        with contextlib.suppress(OSError):
            if _PARTIAL.fullmatch(path.name) and path.is_file() and time.time() - path.stat().st_mtime >= older_than:
                path.unlink()


def open_regular(path: Path | str) -> io.BufferedReader:
    """Open a file that has an end: opening or reading a pipe or a device might never return.

    Raises:
        OSError: it cannot be opened, or is a folder, a pipe or a device.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as error:  # a NUL in the path
        raise OSError(str(error)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is no regular file")
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path | str) -> bytes:
    """Return the bytes of a file that has an end. Errors are those of `open_regular`."""
    with open_regular(path) as file:
        data: bytes | None = file.read()
    if data is None:  # a file of the kernel's that would have to be waited for
        raise OSError("it has no end")
    return data


def check_regular(path: Path | str) -> None:
    """Check that a path is a file that has an end. Errors are those of `open_regular`."""
    open_regular(path).close()


def read_json(path: Path) -> Any:
    """Return the value of a JSON file.

    Raises:
        OSError: it cannot be read, or is no regular file.
        ValueError: it is not JSON.
    """
    return parse_json(read_regular(path).decode("utf-8"))


def parse_json(text: str) -> Any:
    """Return the value of a JSON text; whatever is wrong with the text raises a ``ValueError``."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class Lock:
    """A lock on a folder that ends with the process that has it, however that ends.

    Args:
        folder: the folder, in which the file ``.lock`` is created.
    """

    NAME = ".lock"

    def __init__(self, folder: Path) -> None:
        self._path = folder / self.NAME
        self._file: int | None = None

    def acquire(self) -> None:
        """Take the lock. On a file system without locks nothing happens.

        Raises:
            OSError: the folder cannot be written.
            MLLMError: another process has it.
        """
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(file, 100).decode(errors="replace").strip() or "another process"
                os.close(file)
                raise MLLMError(
                    f"{self._path.parent} is in use by {holder}. Wait until it ends, or give another folder."
                ) from None
            except OSError:
                pass
            if _is_at(file, self._path):
                break
            os.close(file)  # it was released, and so removed, between opening and locking
        self._file = file
        os.truncate(file, 0)
        os.write(file, f"process {os.getpid()} on {platform.node()}\n".encode())

    def release(self) -> None:
        """Release the lock, if it is held, and remove its file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is the one that a path leads to."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


_LITTER = ("__MACOSX", "@eaDir")  # folders that macOS and Synology add


def is_hidden(path: Path) -> bool:
    """Return whether a file is hidden, or is in a hidden folder: ``.DS_Store``, ``._a.jpg``, ``__MACOSX/a.jpg``."""
    return any(part in _LITTER or (part.startswith(".") and part not in (".", "..")) for part in path.parts)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # <malloc.h>
LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Ask glibc to reuse freed buffers of any size; elsewhere nothing happens. For the whole process.

    To be called before torch is imported, which reads its setting once.
    """
    if sys.platform != "linux":
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: huge pages for buffers of 2 MiB and more
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # absent in other C libraries
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, LARGEST)


def share_heap() -> None:
    """Ask glibc for one heap for the threads that are started from now on; elsewhere nothing happens.

    With a heap for each, what is freed in one leaves gaps that the others cannot use, and a server of many threads
    keeps them.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)


def return_memory() -> None:
    """Return freed memory to the system: between phases that need memory of different sizes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def checked_text(text: str) -> str:
    """Return a text that tokenizers can read.

    Raises:
        MLLMError: it has a lone surrogate, which is no character: JSON can escape one, and bytes of an argument that
            are no UTF-8 become some.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.start + 20]
        raise MLLMError(
            f"The text {around!r} has a lone surrogate, which is no character. Write it in UTF-8."
        ) from None
    return text


def cache_dir() -> Path:
    """Return the folder that keeps the parts: ``$MLLM_CACHE``, else ``mllm`` in the user's cache folder."""
    if folder := os.environ.get("MLLM_CACHE"):
        return Path(folder).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mllm"
