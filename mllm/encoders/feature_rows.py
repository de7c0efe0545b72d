"""Keep rows of features in memory and on disk, under the keys of their images.

A shard on disk is a safetensors file. It is verified when it is read; the rows of a damaged one are as if they had
never been kept, so that they are computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mllm.errors import MLLMError
from mllm.hub.verified import DamagedFile, read_verified, save_verified
from mllm.system import check_regular, remove_partial

LIMIT = 4 * 2**30  # bytes
ABANDONED = 24 * 3600  # seconds; what is written to a file for longer was left by a killed process


class FeatureRows:
    """Rows of features, in memory and, given a folder, on disk.

    Args:
        folder: the folder of the shards on disk; None: memory only.
        limit: the most bytes that are kept; further rows are not. None: no limit.
        fits: whether a tensor that was read can be a row; one that does not fit is damaged.
    """

    def __init__(self, folder: Path | None, *, limit: int | None, fits: Callable[[Tensor], bool]) -> None:
        self._folder, self._limit, self._fits = folder, limit, fits
        self._cached: dict[str, Tensor] = {}
        self._new: list[str] = []  # the keys that are not on disk yet
        self._stored = _index(folder) if folder else {}
        self._bytes = sum(path.stat().st_size for path in set(self._stored.values()))

    def __contains__(self, key: str) -> bool:
        """Whether there is a row under a key; what is on disk may turn out to be damaged when it is read."""
        return key in self._cached or key in self._stored

    def get(self, key: str) -> Tensor | None:
        """Return the row under a key, or None."""
        if key not in self._cached and key in self._stored:
            self._read(self._stored[key])
        return self._cached.get(key)

    def put(self, key: str, row: Tensor) -> None:
        """Keep a row, unless the limit is reached."""
        size = row.numel() * row.element_size()
        if self._limit is None or self._bytes + size <= self._limit:
            self._cached[key] = row.to("cpu", copy=True)  # a view would keep the whole chunk in memory
            self._new.append(key)
            self._bytes += size

    def flush(self) -> None:
        """Write new rows to a shard on disk, atomically: an interrupted write leaves no file.

        Raises:
            MLLMError: the folder cannot be written.
        """
        if self._folder is None or not self._new:
            return
        rows = {key: self._cached[key].contiguous() for key in self._new}
        path = self._folder / f"{hashlib.sha256(''.join(rows).encode()).hexdigest()[:16]}.safetensors"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_verified(path, rows)
        except (OSError, SafetensorError) as error:
            raise MLLMError(
                f"The features could not be written to {self._folder}: {error}. Free some disk space, or set cache=off."
            ) from error
        self._stored |= dict.fromkeys(rows, path)
        self._new = []

    def _read(self, path: Path) -> None:
        """Read a shard from disk; a damaged one is discarded, with a warning, and its features are computed again."""
        try:
            rows, _ = read_verified(path)
            if not all(map(self._fits, rows.values())):
                raise DamagedFile("its features are of another shape or type")
        except (DamagedFile, OSError) as error:
            self._stored = {key: shard for key, shard in self._stored.items() if shard != path}
            _discard(path, error)
            return
        self._cached = {**rows, **self._cached}


def _index(folder: Path) -> dict[str, Path]:
    """Return the shard of every key on disk; a damaged one is discarded, so its features are computed again."""
    shards: dict[str, Path] = {}
    remove_partial(folder, older_than=ABANDONED)
    for path in sorted(folder.glob("*.safetensors")):
        try:
            check_regular(path)
            with safe_open(path, framework="pt") as shard:
                shards |= dict.fromkeys(shard.keys(), path)
        except (SafetensorError, OSError) as error:
            _discard(path, error)
    return shards


def _discard(shard: Path, error: Exception) -> None:
    """Warn of a shard that cannot be used, and remove it, unless the system could not read it."""
    warnings.warn(
        f"The cached features in {shard} cannot be used: {error}. They are computed again.", UserWarning, stacklevel=2
    )
    if not isinstance(error, OSError):
        with contextlib.suppress(OSError):
            shard.unlink(missing_ok=True)
