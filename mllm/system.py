"""Write files atomically, and keep freed memory in the process.

The C library returns large buffers to the kernel as soon as they are freed, and every step of a model allocates the
same sizes again: on a CPU the page faults took most of a convolutional encoder's time (measured: 40 ms per image
instead of 12 ms, batches of 32, two cores). torch allocates the largest buffers on huge pages.
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
    """Write a file atomically: ``action`` writes a temporary file in the same folder, which is then renamed."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        action(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Make glibc reuse freed buffers of any size in this process; other C libraries are left unchanged.

    Call it before torch is imported, which reads the environment variable once.
    """
    if sys.platform != "linux":
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: huge pages for buffers of 2 MiB and more
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # absent in other C libraries
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, LARGEST)


def return_memory() -> None:
    """Return freed memory to the system, between phases that allocate buffers of different sizes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def cache_dir() -> Path:
    """Return the folder of embedded parts and cached features: ``$MLLM_CACHE``, or ``mllm`` in the user's cache."""
    if folder := os.environ.get("MLLM_CACHE"):
        return Path(folder).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mllm"
