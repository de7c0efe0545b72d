"""Look up precomputed features in safetensors files instead of encoding images.

The same readers give the images, but only an image's file name (or content hash) is used and no image is opened.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mllm.errors import MLLMError, near
from mllm.hub.fingerprints import file_hash
from mllm.media.images import ImageFile, ImageSource, source_of
from mllm.slots import Encoder


class StoredFeatures(Encoder):
    """Precomputed features in safetensors files: a tensor ``(P, D_vis)`` or ``(D_vis,)`` for each image.

    Args:
        path: a file, or a folder of files (the feature cache writes such files, with ``by: content``).
        by: how an image's tensor is named: by the ``name`` of its file (``cat.png``), the ``stem`` of the name
            (``cat``), its ``path`` relative to ``root`` (``val/cat.png``), or its ``content`` (the file's SHA-256).
        root: the folder that paths are relative to.
        grid: rows and columns of the patches, if they form a grid.
        seed: unused.

    Raises:
        MLLMError: there is no such file, or it contains no tensor of the expected shape.
    """

    cacheable = False
    reads_images = False

    def __init__(
        self,
        *,
        path: str,
        by: Literal["name", "stem", "path", "content"] = "name",
        root: str | None = None,
        grid: tuple[int, int] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if by not in ("name", "stem", "path", "content"):
            raise MLLMError(f"encoder.by is {by!r}: expected name, stem, path or content. Choose one of them.")
        self.path, self.by, self.root = Path(path), by, root
        self._files = _files(self.path)
        self._file_of = _index(self._files)
        self.shape = _shape(self._file_of, self.path)
        self.num_patches, self.dim = self.shape
        self.grid = (grid[0], grid[1]) if grid else None
        if self.grid and self.grid[0] * self.grid[1] != self.num_patches:
            raise MLLMError(
                f"encoder.grid is {list(self.grid)}, but {path} has {self.num_patches} features per image. Give a "
                "grid of that size, or leave out encoder.grid."
            )

    @property
    def fingerprint(self) -> str:
        """Return a hash of the files."""
        return hashlib.sha256("".join(file_hash(file) for file in self._files).encode()).hexdigest()

    def settings(self) -> dict[str, Any]:
        """Return the settings that, with the files, determine the features."""
        return {"by": self.by, "root": self.root}

    def open(self, piece: Any) -> Tensor:
        """Return an image's features ``(P, D_vis)``.

        Raises:
            MLLMError: there are no features under its name, or their shape differs from the others'.
        """
        if isinstance(piece, Tensor):
            return piece
        name = self.key(source_of(piece))
        if name not in self._file_of:
            raise MLLMError(
                f"{self.path} has no features called {name!r} (encoder.by={self.by}). {near(name, self._file_of)}"
            )
        with safe_open(self._file_of[name], framework="pt") as file:
            row = file.get_tensor(name)
        row = row[None] if row.ndim == 1 else row
        if tuple(row.shape) != self.shape:
            raise MLLMError(
                f"{self.path}: {name!r} has shape {tuple(row.shape)}; expected {self.shape}, as the others have. Store "
                "features of one shape."
            )
        return row

    def key(self, source: ImageSource) -> str:
        """Return the name of an image's features."""
        if self.by == "content":
            return source.key()
        if not isinstance(source, ImageFile):
            raise MLLMError(
                f"An image in memory has no {self.by}, and encoder.by={self.by} needs one to look up its features. "
                "Give its file's path, or store features by content (encoder.by=content)."
            )
        if self.by == "path":
            return _relative_to(source.path, self.root)
        return source.path.name if self.by == "name" else source.path.stem

    def preprocess(self, items: Sequence[Tensor]) -> Tensor:
        """Return features ``(B, P, D_vis)``."""
        return torch.stack(list(items))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the features unchanged."""
        return pixels


def _files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.safetensors")) if os.path.isdir(path) else [path]
    if not files or not all(os.path.isfile(file) for file in files):
        raise MLLMError(
            f"encoder.path is {str(path)!r}: no such file, or a folder without *.safetensors files. Give the path of a "
            "safetensors file, or of a folder of them."
        )
    return files


def _index(files: Sequence[Path]) -> dict[str, Path]:
    """Return the file of every tensor, by the tensor's name."""
    file_of: dict[str, Path] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
        except (SafetensorError, OSError) as error:
            raise MLLMError(f"{path} is not a readable safetensors file: {error}. Is the file complete?") from None
        duplicate = next((name for name in names if name in file_of), None)
        if duplicate is not None:
            raise MLLMError(
                f"{path} and {file_of[duplicate]} both contain features of {duplicate!r}. Remove one of them."
            )
        file_of |= dict.fromkeys(names, path)
    return file_of


def _shape(file_of: dict[str, Path], path: Path) -> tuple[int, int]:
    """Return (P, D_vis) of the first tensor, read from the file's header."""
    if not file_of:
        raise MLLMError(f"{path} contains no tensors: expected one for each image. Store features in it first.")
    name, first = next(iter(file_of.items()))
    with safe_open(first, framework="pt") as file:
        shape = file.get_slice(name).get_shape()
    if len(shape) not in (1, 2):
        raise MLLMError(f"{path}: {name!r} has shape {tuple(shape)}; expected (P, D_vis) or (D_vis,). Reshape it.")
    return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])


def _relative_to(path: Path, root: str | None) -> str:
    if root is None:
        return path.as_posix()
    if not path.is_relative_to(root):
        raise MLLMError(
            f"The image {path} is outside of encoder.root, {root!r}. Set encoder.root to a folder that contains it."
        )
    return path.relative_to(root).as_posix()
