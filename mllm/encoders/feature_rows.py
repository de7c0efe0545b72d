"""Keep rows of features in the host's memory and on disk, under the keys of their images.

In memory are the rows that were used last, up to a bound. On disk, rows are in shards: safetensors files of bounded
size, written while further rows come, each of them whole or not at all. One row is read without the others of its
shard, and every byte of it is verified. A shard in which a row is damaged is discarded, and its rows are computed
again.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mllm.errors import MLLMError
from mllm.hub.verified import DamagedFile, read_tensor, save_each_verified
from mllm.system import open_regular, remove_partial

SHARD = 2**26  # bytes of a shard; so many may be lost when a process is killed, and so many more are being written
HEADER = 512  # bytes of a row in a shard's header, at most: its name, shape, place and checksum
ABANDONED = 24 * 3600  # seconds; what is written to a file for longer was left by a killed process


class FeatureRows:
    """Rows of features, in memory and, given a folder, on disk. Threads may share it.

    Args:
        folder: the folder of the shards on disk; None: memory only.
        limit: the most bytes in the folder; further rows are not kept. None: no limit.
        memory: the most bytes in memory, with those that wait to be written, unless more are computed at once.
        fits: whether a tensor that was read can be a row; one that does not fit is damaged.
        writers: the number of processes that write to the folder, among which the rest of the limit is divided.

    Attributes:
        full: whether the limit was reached.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        fits: Callable[[Tensor], bool],
        limit: int | None,
        memory: int,
        writers: int = 1,
    ) -> None:
        self._folder, self._fits = folder, fits
        memory = memory if limit is None else min(memory, limit)
        self._shard = min(SHARD, memory // 8) if folder else 0
        self._used = _LastUsed(
            memory - 4 * self._shard
        )  # one waits, one is written; pinned memory may be twice as much
        self._waiting: dict[str, Tensor] = {}  # to be written
        self._waiting_bytes = 0
        self._written: dict[str, Tensor] = {}  # being written
        self._writing: Future[Path] | None = None
        self._stored, self._bytes = _index(folder) if folder else ({}, 0)
        self._limit = None if limit is None else self._bytes + max(0, limit - self._bytes) // writers
        self.full = False
        self._lock = threading.RLock()
        self._writer = ThreadPoolExecutor(1)

    def __contains__(self, key: str) -> bool:
        """Whether there is a row under a key; what is on disk may turn out to be damaged when it is read."""
        with self._lock:
            return key in self._stored or self._held(key) is not None

    def get(self, key: str) -> Tensor | None:
        """Return the row under a key, or None."""
        with self._lock:
            row, path = self._held(key), self._stored.get(key)
        return row if row is not None or path is None else self._read(key, path)

    def put(self, rows: Mapping[str, Tensor]) -> None:
        """Keep rows that were computed together: all of them, or none where they would exceed the limit.

        On disk, too, are all of them or none: if they are computed again, it is in the same forward pass, whose results
        might otherwise differ in the last bit.

        Raises:
            MLLMError: the folder cannot be written.
        """
        size = sum(row.nbytes + HEADER for row in rows.values())
        if self._folder is not None:
            if self._limit is not None and self._bytes + size > self._limit:
                self.full = True
                return
            if self._waiting_bytes + size > self._shard:
                self._write()
            self._waiting_bytes += size
        copies = {key: _in_host_memory(row) for key, row in rows.items()}
        if any(row.is_cuda for row in rows.values()):
            torch.cuda.current_stream().synchronize()  # once, for all copies
        with self._lock:
            for key, kept in copies.items():
                self._used.add(key, kept)
                if self._folder is not None:
                    self._waiting[key] = kept
        self._bytes += size

    def flush(self) -> None:
        """Write the rows that are not on disk yet.

        Raises:
            MLLMError: the folder cannot be written; the rows wait to be written again.
        """
        self._write()
        self._settle()

    def _held(self, key: str) -> Tensor | None:
        """Return a row that is in memory."""
        row = self._used.get(key)
        return next((rows[key] for rows in (self._waiting, self._written) if key in rows), None) if row is None else row

    def _read(self, key: str, path: Path) -> Tensor | None:
        """Read a row from a shard; a damaged one is discarded, with a warning."""
        try:
            read = read_tensor(path, key)
            if not self._fits(read):
                raise DamagedFile("its features are of another shape or type")
        except (DamagedFile, OSError) as error:
            with self._lock:
                self._stored = {name: shard for name, shard in self._stored.items() if shard != path}
            _discard(path, error)
            return None
        row = _in_host_memory(read)
        with self._lock:
            self._used.add(key, row)
        return row

    def _write(self) -> None:
        """Start to write a shard of the rows that wait, after the one before is written."""
        self._settle()
        if not self._waiting:
            return
        with self._lock:
            self._written, self._waiting, self._waiting_bytes = self._waiting, {}, 0
        assert self._folder is not None
        self._writing = self._writer.submit(_save, self._folder, self._written)

    def _settle(self) -> None:
        """Wait until a shard is written; where it could not be, its rows wait again."""
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        try:
            path = writing.result()
            with self._lock:
                self._stored |= dict.fromkeys(self._written, path)
                self._written = {}
        except MLLMError:
            with self._lock:
                self._waiting, self._written = {**self._written, **self._waiting}, {}
            raise


class _LastUsed:
    """The rows that were used last.

    Args:
        limit: the most bytes of them.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._rows: OrderedDict[str, Tensor] = OrderedDict()

    def get(self, key: str) -> Tensor | None:
        if key in self._rows:
            self._rows.move_to_end(key)
        return self._rows.get(key)

    def add(self, key: str, row: Tensor) -> None:
        if key in self._rows or _allocated(row) > self._limit:
            return
        self._bytes += _allocated(row)
        while self._bytes > self._limit:
            self._bytes -= _allocated(self._rows.popitem(last=False)[1])
        self._rows[key] = row


def _in_host_memory(row: Tensor) -> Tensor:
    """Return a copy of a row: a view would keep the whole chunk. It is pinned if this process computes with CUDA."""
    pinned = torch.cuda.is_initialized()
    return torch.empty(row.shape, dtype=row.dtype, pin_memory=pinned).copy_(row, non_blocking=row.is_cuda)


def _allocated(row: Tensor) -> int:
    """Return the bytes of a row in memory; torch allocates pinned memory in powers of two."""
    return 1 << max(0, row.nbytes - 1).bit_length() if row.is_pinned() else row.nbytes


def _save(folder: Path, rows: Mapping[str, Tensor]) -> Path:
    """Write a shard, and return its path.

    Raises:
        MLLMError: the folder cannot be written.
    """
    path = folder / f"{hashlib.sha256(''.join(rows).encode()).hexdigest()[:16]}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_each_verified(path, rows)
    except (OSError, SafetensorError) as error:
        raise MLLMError(
            f"The features could not be written to {folder}: {error}. Free some disk space, or set cache=off."
        ) from error
    return path


def _index(folder: Path) -> tuple[dict[str, Path], int]:
    """Return the shard of every row on disk, and the bytes of all rows; a damaged shard is discarded."""
    shards: dict[str, Path] = {}
    total = 0
    remove_partial(folder, older_than=ABANDONED)
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with open_regular(path) as file:
                header = 8 + int.from_bytes(file.read(8), "little")
            with safe_open(path, framework="pt") as shard:
                keys = shard.keys()
            shards |= dict.fromkeys(keys, path)
            total += path.stat().st_size - header + len(keys) * HEADER
        except (SafetensorError, OSError) as error:
            _discard(path, error)
    return shards, total


def _discard(shard: Path, error: Exception) -> None:
    """Warn of a shard that cannot be used, and remove it, unless the system could not read it."""
    warnings.warn(
        f"The cached features in {shard} cannot be used: {error}. They are computed again.", UserWarning, stacklevel=2
    )
    if not isinstance(error, OSError):
        with contextlib.suppress(OSError):
            shard.unlink(missing_ok=True)
