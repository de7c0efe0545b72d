"""Write files whole or not at all, and keep freed memory in the process.

The C library returns large buffers to the kernel as soon as they are free, and every step of a model asks for the same
ones again: on a CPU the page faults of this took most of a convolutional encoder's time (measured: 40 ms an image
against 12 ms, batches of 32, two cores). In one heap they leave gaps, so the largest are on huge pages.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


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


_LITTER = ("__MACOSX", "@eaDir")  # folders that macOS and Synology add


def is_hidden(path: Path) -> bool:
    """Return whether a file is hidden, or is in a hidden folder: ``.DS_Store``, ``._a.jpg``, ``__MACOSX/a.jpg``."""
    return any(part in _LITTER or (part.startswith(".") and part not in (".", "..")) for part in path.parts)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
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


def return_memory() -> None:
    """Return freed memory to the system: between phases that need memory of different sizes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def cache_dir() -> Path:
    """Return the folder that keeps the parts: ``$MLLM_CACHE``, else ``mllm`` in the user's cache folder."""
    if folder := os.environ.get("MLLM_CACHE"):
        return Path(folder).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mllm"
