"""Open pictures, from wherever they come, as RGB, with limits on bytes, pixels and frames."""

from __future__ import annotations

import base64
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from PIL import Image, ImageOps, UnidentifiedImageError

from mllm.errors import MLLMError

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 64_000_000  # checked from the header, before anything is decoded


@runtime_checkable
class ImageSource(Protocol):
    """A picture that is opened when it is needed: a file, or a scene that is drawn."""

    def open(self) -> Image.Image:
        """Return the picture, RGB."""

    def key(self) -> str:
        """Return a hash of the picture's content: equal keys, equal pixels."""


@dataclass(frozen=True)
class ImageFile:
    """A picture in a file."""

    path: Path

    def open(self) -> Image.Image:
        return open_image(self.path)

    def key(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()
