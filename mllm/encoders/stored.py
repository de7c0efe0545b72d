"""Features that were computed elsewhere, as an encoder: they are looked up, and no picture is opened.

Pictures come through the same readers as ever; of each, only its name (or content) is asked.
"""

from __future__ import annotations

import hashlib
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
    """Rows of safetensors files, a tensor ``(P, D_vis)`` or ``(D_vis,)`` for each picture.

    Args:
        path: a file, or a folder of such files (the feature cache writes them too, by content).
        by: the name of a picture's tensor: its file's ``name`` (``cat.png``), the name's ``stem`` (``cat``), its
            ``path`` from ``root`` on (``val/cat.png``), or a hash of its ``content`` (SHA-256 of the file).
        root: the folder that paths start from.
        grid: rows and columns of the patches, where they are a grid.
        seed: not used.

    Raises:
        MLLMError: no such file, or no tensor of the right form in it.
    """

    cacheable = False

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
            raise MLLMError(f"encoder.by is {by!r}: expected name, stem, path or content.")
        self.path, self.by, self.root = Path(path), by, root
        self._files = _files(self.path)
        self._place = _index(self._files)
        self.shape = _shape(self._place, self.path)
        self.num_patches, self.dim = self.shape
        self.grid = (grid[0], grid[1]) if grid else None
        if self.grid and self.grid[0] * self.grid[1] != self.num_patches:
            raise MLLMError(f"encoder.grid is {list(self.grid)}, and {path} has {self.num_patches} features a picture.")

    @property
    def fingerprint(self) -> str:
        """Return a hash of the files: other features, another encoder."""
        return hashlib.sha256("".join(file_hash(file) for file in self._files).encode()).hexdigest()

    def settings(self) -> dict[str, Any]:
        """Return what, beside the files, decides the features."""
        return {"by": self.by, "root": self.root}

    def open(self, piece: Any) -> Tensor:
        """Return a picture's features ``(P, D_vis)``.

        Raises:
            MLLMError: there are none under its name.
        """
        if isinstance(piece, Tensor):
            return piece
        name = self.key(source_of(piece))
        if name not in self._place:
            raise MLLMError(
                f"{self.path} has no features called {name!r} (encoder.by={self.by}). {near(name, self._place)}"
            )
        with safe_open(self._place[name], framework="pt") as file:
            row = file.get_tensor(name)
        row = row[None] if row.ndim == 1 else row
        if tuple(row.shape) != self.shape:
            raise MLLMError(f"{self.path}: {name!r} has shape {tuple(row.shape)}, and others have {self.shape}.")
        return row

    def key(self, source: ImageSource) -> str:
        """Return the name that a picture's features have."""
        if self.by == "content":
            return source.key()
        if not isinstance(source, ImageFile):
            raise MLLMError(
                f"A picture that is in memory has no {self.by}, which its features are looked up by. Name its file, or "
                "store features by content (encoder.by=content)."
            )
        if self.by == "path":
            return _below(source.path, self.root)
        return source.path.name if self.by == "name" else source.path.stem

    def preprocess(self, items: Sequence[Tensor]) -> Tensor:
        """Return features ``(B, P, D_vis)``."""
        return torch.stack(list(items))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return them as they are."""
        return pixels


def _files(path: Path) -> list[Path]:
    found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not found or not all(file.is_file() for file in found):
        raise MLLMError(f"encoder.path is {str(path)!r}: there is no such file, or no *.safetensors in that folder.")
    return found


def _index(files: Sequence[Path]) -> dict[str, Path]:
    """Return name -> file of every tensor."""
    places: dict[str, Path] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
        except (SafetensorError, OSError) as error:
            raise MLLMError(f"{path} is no safetensors file that can be read: {error}.") from None
        twice = next((name for name in names if name in places), None)
        if twice is not None:
            raise MLLMError(f"{path} and {places[twice]} both have features called {twice!r}. Take one of them away.")
        places |= dict.fromkeys(names, path)
    return places


def _shape(places: dict[str, Path], path: Path) -> tuple[int, int]:
    """Return (P, D_vis) of the first tensor, read from the file's head."""
    if not places:
        raise MLLMError(f"{path} holds no tensors.")
    name, place = next(iter(places.items()))
    with safe_open(place, framework="pt") as file:
        shape = file.get_slice(name).get_shape()
    if len(shape) not in (1, 2):
        raise MLLMError(f"{path}: {name!r} has shape {tuple(shape)}; expected (P, D_vis) or (D_vis,).")
    return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])


def _below(path: Path, root: str | None) -> str:
    if root is None:
        return path.as_posix()
    if not path.is_relative_to(root):
        raise MLLMError(f"The picture {path} is outside of encoder.root, {root!r}.")
    return path.relative_to(root).as_posix()
