"""Note what a source's policy asks of items, in a few bytes an item, so that none of them has to be kept."""

from __future__ import annotations

import hashlib
import os
import stat
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.media.images import ImageFile

_THREADS = 16  # that look for files: on a network's file system each look is an answer to wait for
_AT_ONCE = 1000  # files that a thread looks for


class Notes:
    """The image files that items show, hashes of their ids, and what a check has against them.

    Attributes:
        files: the image files by name, each with its number.
        refused: the reason for which the check refuses an item, by the item's index.
        images: a hash of the names and sizes of the image files, once they were looked for.
    """

    def __init__(self) -> None:
        self.files: dict[str, int] = {}
        self.refused: dict[int, str] = {}
        self.images = ""
        self._shown, self._ends, self._ids = array("q"), array("q"), array("q")

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, item: Item, check: Callable[[Item], None] | None) -> None:
        """Note an item; ``check`` raises an `MLLMError` for one that is no use."""
        if check is not None:
            try:
                check(item)
            except MLLMError as error:
                self.refused[len(self)] = str(error)
        for image in images_of(item) if item.shots else item.images:
            if isinstance(image, ImageFile):
                self._shown.append(self.files.setdefault(str(image.path), len(self.files)))
        self._ends.append(len(self._shown))
        self._ids.append(hash(item.id))

    def extend(self, other: Notes) -> None:
        """Add the notes of other items, which follow these."""
        before, start = len(self), len(self._shown)
        numbers = [self.files.setdefault(name, len(self.files)) for name in other.files]
        self._shown.extend(numbers[number] for number in other._shown)
        self._ends.extend(start + end for end in other._ends)
        self._ids.extend(other._ids)
        self.refused |= {before + index: reason for index, reason in other.refused.items()}

    def note_sizes(self, sizes: Sequence[int | None]) -> None:
        """Note the sizes of the image files, None for one that is missing."""
        digest = hashlib.sha256()
        for name, size in zip(self.files, sizes, strict=True):
            digest.update(f"{os.path.basename(name)} {size}\n".encode(errors="surrogatepass"))
        self.images = digest.hexdigest()

    def forget(self) -> None:
        """Forget everything but the hash of the image files: which items are kept is decided."""
        self.files, self.refused = {}, {}
        self._shown, self._ends, self._ids = array("q"), array("q"), array("q")

    def showing(self, there: Sequence[bool]) -> list[int]:
        """Return the indices of the items whose images are all there, by the numbers of the images."""
        if all(there):
            return list(range(len(self)))
        missing = np.concatenate([[0], np.cumsum(~np.array(there, dtype=bool)[np.array(self._shown, dtype=np.int64)])])
        ends = np.array(self._ends, dtype=np.int64)
        starts = np.concatenate([[0], ends[:-1]])
        return np.flatnonzero(missing[ends] == missing[starts]).tolist()

    def doubled(self, indices: Sequence[int], id_of: Callable[[int], str]) -> dict[str, list[int]]:
        """Return the ids that several of some items have, each with the indices of its items."""
        times = Counter(self._ids[index] for index in indices)
        if len(times) == len(indices):
            return {}
        groups: dict[str, list[int]] = {}
        for index in (index for index in indices if times[self._ids[index]] > 1):
            groups.setdefault(id_of(index), []).append(index)
        return {key: group for key, group in groups.items() if len(group) > 1}


def images_of(item: Item) -> list[Any]:
    """Return an item's images and those of its shots."""
    return [*item.images, *(image for shot in item.shots for image in images_of(shot))]


def sizes_of(files: Sequence[str]) -> list[int | None]:
    """Return the sizes of files, looked for in threads; None for what is no regular file, or is not there."""
    if len(files) <= _AT_ONCE:
        return list(map(_size, files))
    parts = [files[start : start + _AT_ONCE] for start in range(0, len(files), _AT_ONCE)]
    with ThreadPoolExecutor(_THREADS) as pool:
        return [size for sizes in pool.map(lambda part: list(map(_size, part)), parts) for size in sizes]


def _size(file: str) -> int | None:
    try:
        status = os.stat(file)
    except (OSError, ValueError):  # a name that is too long, or has a NUL
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None
