"""Look for image files, each once, in threads, and tell which items can be shown with them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mllm.data.notes import Notes, sizes_of
from mllm.data.report import Report
from mllm.media.images import ImageFile


class Presence:
    """Which image files of a source are there.

    Args:
        report: what is missing is added to it.
        drop: items that show a missing image are left out; else they are kept, and it is an error in the end.
        needed: whether images are needed; else none is looked for.
    """

    def __init__(self, report: Report, *, drop: bool, needed: bool) -> None:
        self._report, self._drop, self._needed = report, drop, needed
        self._sizes: dict[str, int | None] = {}

    @property
    def looked_for(self) -> int:
        """Return the number of the files that were looked for."""
        return len(self._sizes)

    def afresh(self) -> Presence:
        """Return another that has looked for nothing and reports nothing, for items that are made again."""
        return Presence(Report(), drop=self._drop, needed=self._needed)

    def of(self, image: Any) -> bool:
        """Return whether an image is kept: one that is not needed, is no file, exists, or is an error in the end."""
        if not self._needed or not isinstance(image, ImageFile):
            return True
        file = str(image.path)
        self._look_for([file])
        return self._kept(file)

    def showing(self, notes: Notes) -> list[int]:
        """Return the indices of the items whose images are all kept, and note the sizes of the image files."""
        if not self._needed:
            return list(range(len(notes)))
        self._look_for(notes.files)
        notes.note_sizes([self._sizes[file] for file in notes.files])
        indices = notes.showing([self._kept(file) for file in notes.files])
        if len(indices) < len(notes):
            self._report.counts["items with a missing image"] += len(notes) - len(indices)
        return indices

    def _kept(self, file: str) -> bool:
        return self._sizes[file] is not None or not self._drop

    def _look_for(self, files: Iterable[str]) -> None:
        new = [file for file in files if file not in self._sizes]
        for file, size in zip(new, sizes_of(new), strict=True):
            self._sizes[file] = size
            if size is None:
                self._report.absent.append(file)
