"""Return freed memory to the system: the allocator of glibc keeps that of bodies and images."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
from collections.abc import AsyncIterator, Callable

SECONDS = 5.0  # between two times


@contextlib.asynccontextmanager
async def trimmed(requests: Callable[[], int]) -> AsyncIterator[None]:
    """Return freed memory to the system from time to time, after requests, until the block ends.

    Args:
        requests: returns how many there were.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other allocators have none

    async def repeat() -> None:
        before = requests()
        while trim is not None:
            await asyncio.sleep(SECONDS)
            if (now := requests()) != before:
                await asyncio.to_thread(trim, 0)
            before = now

    task = asyncio.create_task(repeat())
    try:
        yield
    finally:
        task.cancel()
