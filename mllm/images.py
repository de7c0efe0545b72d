"""Open pictures, from wherever they come, as RGB, with limits on bytes, pixels and frames."""

from __future__ import annotations

import base64
import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
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


def open_image(image: Any) -> Image.Image:
    """Return any accepted form of a picture as an RGB PIL image, turned as its EXIF says.

    Args:
        image: a PIL image, an array ``(H, W, 3)`` of uint8 (or ``(H, W)``), a path, bytes, a data URL, an `ImageSource`.

    Raises:
        MLLMError: it is no picture, is truncated, has too many bytes or pixels, or is of another form.
    """
    if isinstance(image, ImageSource) and not isinstance(image, Image.Image):
        return image.open()
    if isinstance(image, Image.Image):
        return _rgb(image, "the image")
    if isinstance(image, str) and image.startswith("data:"):
        return _decode(_from_data_url(image), "the data URL")
    if isinstance(image, str | Path):
        return _decode(_read(Path(image)), str(image))
    if isinstance(image, bytes):
        return _decode(image, f"the {len(image)} bytes given")
    if hasattr(image, "__array_interface__"):
        return _from_array(image)
    raise MLLMError(
        f"{type(image).__name__} is no picture. Give a PIL image, an array, a path, bytes or a data URL."
    )


def source_of(image: Any) -> ImageSource:
    """Return a picture of any accepted form as an `ImageSource`."""
    if isinstance(image, ImageSource) and not isinstance(image, Image.Image):
        return image
    if isinstance(image, str | Path) and not str(image).startswith("data:"):
        return ImageFile(Path(image))
    return _Opened(open_image(image))


@dataclass(frozen=True)
class _Opened:
    """A picture that is in memory already."""

    image: Image.Image

    def open(self) -> Image.Image:
        return self.image

    def key(self) -> str:
        return hashlib.sha256(f"{self.image.size}".encode() + self.image.tobytes()).hexdigest()


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise MLLMError(f"{path} has {path.stat().st_size} bytes; at most {MAX_BYTES} are read.")
        return path.read_bytes()
    except OSError as error:
        raise MLLMError(f"The image {path} cannot be read: {error.strerror or error}.") from None


def _from_data_url(url: str) -> bytes:
    head, _, body = url.partition(",")
    if not head.endswith(";base64"):
        raise MLLMError(f"The data URL starts with {head[:40]!r}; expected data:image/...;base64,...")
    if len(body) > MAX_BYTES * 4 // 3:
        raise MLLMError(f"The data URL is longer than {MAX_BYTES} bytes allow.")
    try:
        return base64.b64decode(body, validate=True)
    except ValueError as error:
        raise MLLMError(f"The data URL is not base64: {error}.") from None


def _decode(data: bytes, label: str) -> Image.Image:
    if len(data) > MAX_BYTES:
        raise MLLMError(f"{label}: {len(data)} bytes; at most {MAX_BYTES} are read.")
    try:
        with warnings.catch_warnings():  # Pillow's own limit is a warning; ours, from the same header, is an error
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise MLLMError(f"{label}: {width} x {height} pixels; at most {MAX_PIXELS} are decoded. Make it smaller.")
        return _rgb(image, label)
    except MLLMError:
        raise
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise MLLMError(f"{label} is no picture that can be read: {error}.") from None


def _rgb(image: Image.Image, label: str) -> Image.Image:
    """Return an RGB picture: the first frame, upright, transparency on white, 16-bit greys scaled to 8."""
    if image.width < 1 or image.height < 1:
        raise MLLMError(f"{label} has no pixels.")
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I;16", "I;16B", "I", "F"):
        image = _eight_bit(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float32)
    top = 65535.0 if image.mode.startswith("I") and values.max() > 255 else max(float(values.max()), 1.0)
    return Image.fromarray((values.clip(0, top) / top * 255).astype(np.uint8))


def _from_array(array: Any) -> Image.Image:
    values = np.asarray(array)
    if values.dtype != np.uint8 or values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)):
        raise MLLMError(
            f"The array has shape {values.shape} and type {values.dtype}; expected uint8 (H, W, 3), (H, W, 4) or (H, W)."
        )
    return _rgb(Image.fromarray(values), "the array")
