"""Open images (files, bytes, arrays, data URLs) as RGB, with limits on bytes and pixels."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mllm.errors import MLLMError
from mllm.system import is_hidden

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 64_000_000  # checked in the header, before anything is decoded
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")  # none of them runs a program
SUFFIXES = {".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".jp2"}  # of images in a folder
DAMAGED = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError, struct.error, zlib.error)


@runtime_checkable
class ImageSource(Protocol):
    """An image that is opened only when it is needed: a file, or a scene that is rendered."""

    def open(self) -> Image.Image:
        """Return the image, RGB."""

    def key(self) -> str:
        """Return a hash of the image's content: equal keys, equal pixels."""


@dataclass(frozen=True)
class Black:
    """A black image that replaces an image, so that a model cannot use its content."""

    def open(self) -> Image.Image:
        """Return the image, RGB."""
        return Image.new("RGB", (64, 64))

    def key(self) -> str:
        """Return the key that all black images share."""
        return "black"


@dataclass(frozen=True)
class ImageFile:
    """An image in a file."""

    path: Path

    def open(self) -> Image.Image:
        """Return the image, RGB."""
        return open_image(self.path)

    def key(self) -> str:
        """Return a hash of the file's bytes."""
        with _open_file(self.path, None, "image") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class ImageBytes:
    """An image whose encoded bytes are in memory, unchanged from the data set's file."""

    data: bytes = field(repr=False)
    label: str  # where it came from, for messages

    def open(self) -> Image.Image:
        """Return the image, RGB."""
        return _decode(self.data, self.label)

    def key(self) -> str:
        """Return a hash of the bytes."""
        return hashlib.sha256(self.data).hexdigest()


def open_image(image: Any) -> Image.Image:
    """Return an image in any accepted form as an RGB PIL image, rotated by its EXIF orientation.

    Args:
        image: a PIL image, an array ``(H, W, 3)`` of uint8 (or ``(H, W)``), a path, bytes, a data URL, or an
            `ImageSource`.

    Raises:
        MLLMError: it is not an image, is truncated, has too many bytes or pixels, or is of an unsupported type.
    """
    if isinstance(image, Image.Image):
        return _rgb(image, "the image")
    if isinstance(image, ImageSource):
        return image.open()
    if isinstance(image, str) and image.startswith("data:"):
        return _decode(_from_data_url(image), "the data URL")
    if isinstance(image, str | Path):
        return _decode(_read(Path(image)), str(image))
    if isinstance(image, bytes):
        return _decode(image, f"the image of {len(image)} bytes")
    if hasattr(image, "__array_interface__"):
        return _from_array(image)
    raise MLLMError(
        f"{type(image).__name__} is not an image: expected a PIL image, an array, a path, bytes or a data URL. "
        "Convert it to one of them."
    )


def source_of(image: Any) -> ImageSource:
    """Return an image of any accepted form as an `ImageSource`."""
    if isinstance(image, ImageSource):
        return image
    if isinstance(image, str | Path) and not str(image).startswith("data:"):
        return ImageFile(Path(image))
    return _LoadedImage(open_image(image))


def find_images(names: Sequence[str | Path]) -> list[Path]:
    """Return the image files that paths name: a file, a folder (its images by name, no hidden ones), or a glob pattern.

    Raises:
        MLLMError: a folder contains no images, or a pattern matches no files.
    """
    files: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if os.path.isdir(path):
            visible = (file for file in path.iterdir() if not is_hidden(Path(file.name)))
            matches = sorted(file for file in visible if file.suffix.lower() in SUFFIXES)
        elif not os.path.lexists(path) and any(mark in str(name) for mark in "*?["):
            matches = [Path(match) for match in sorted(glob(str(path), recursive=True))]
        else:
            matches = [path]  # whether it is an image is checked when it is opened
        if not matches:
            raise MLLMError(
                f"{str(name)!r} contains no images: expected files ending in {', '.join(sorted(SUFFIXES))}. "
                "Give another folder or pattern."
            )
        files += matches
    return files


@dataclass(frozen=True, eq=False)
class _LoadedImage:
    """An image that is already in memory."""

    image: Image.Image

    def open(self) -> Image.Image:
        """Return the image, RGB."""
        return self.image

    def key(self) -> str:
        """Return a hash of the size and the pixels."""
        return hashlib.sha256(f"{self.image.size}".encode() + self.image.tobytes()).hexdigest()


def stream_of(piece: Any, limit: int, kind: str) -> tuple[BinaryIO, str]:
    """Return a video or sound file as a binary stream, and its name for messages.

    Raises:
        MLLMError: there is no such file, it is too large, or the piece is not a file.
    """
    if isinstance(piece, ImageFile | str | Path):
        path = piece.path if isinstance(piece, ImageFile) else Path(piece)
        return _open_file(path, limit, kind), str(path)
    data = piece.data if isinstance(piece, ImageBytes) else piece
    if not isinstance(data, bytes):
        raise MLLMError(
            f"{type(piece).__name__} is not a {kind}, and this encoder takes {kind}s. Give a path or bytes."
        )
    return io.BytesIO(data), piece.label if isinstance(piece, ImageBytes) else f"the {kind} of {len(data)} bytes"


def _open_file(path: Path, limit: int | None, kind: str) -> io.BufferedReader:
    try:
        if not os.path.isfile(path):  # a folder, a device that never ends, a URL
            raise MLLMError(
                f"There is no {kind} file {str(path)!r}. Give the path of a local file; nothing is downloaded."
            )
        if limit is not None and path.stat().st_size > limit:
            raise MLLMError(f"{path} has {path.stat().st_size} bytes; at most {limit} are read. Make it smaller.")
        return path.open("rb")
    except OSError as error:
        raise MLLMError(f"The {kind} {path} cannot be read: {error.strerror or error}.") from None


def _read(path: Path) -> bytes:
    with _open_file(path, MAX_BYTES, "image") as file:
        try:
            return file.read()
        except OSError as error:
            raise MLLMError(f"The image {path} cannot be read: {error.strerror or error}.") from None


def _from_data_url(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise MLLMError(f"The data URL starts with {head[:40]!r}; expected data:image/...;base64,...")
    if len(body) > MAX_BYTES * 4 // 3:
        raise MLLMError(
            f"The data URL encodes more than {MAX_BYTES} bytes, which is the limit. Make the image smaller."
        )
    try:
        return base64.b64decode(body, validate=True)
    except ValueError as error:
        raise MLLMError(f"The data URL is not valid base64: {error}. Encode the image file as base64.") from None


def _decode(data: bytes, label: str) -> Image.Image:
    if len(data) > MAX_BYTES:
        raise MLLMError(f"{label}: {len(data)} bytes; at most {MAX_BYTES} are read. Make it smaller.")
    with _readable_errors(label):
        return _rgb(Image.open(io.BytesIO(data), formats=FORMATS), label)


@contextlib.contextmanager
def _readable_errors(label: str) -> Iterator[None]:
    """Turn every exception that Pillow raises for a damaged file into a message that names the image."""
    try:
        with warnings.catch_warnings():  # about Pillow's pixel limit (ours is lower) and damaged EXIF data
            warnings.simplefilter("ignore")
            yield
    except MLLMError:
        raise
    except Image.DecompressionBombError as error:
        raise MLLMError(f"{label}: {error} At most {MAX_PIXELS} pixels are decoded. Make it smaller.") from None
    except UnidentifiedImageError:
        raise MLLMError(f"{label} is not a readable image. Expected one of {', '.join(FORMATS)}.") from None
    except DAMAGED as error:
        raise MLLMError(f"{label} is not a readable image: {error}. Is the file complete?") from None


def _rgb(image: Image.Image, label: str) -> Image.Image:
    """Return an RGB image: the first frame, upright, transparency on white, 16-bit greyscale scaled to 8 bits."""
    width, height = image.size
    if not width or not height:
        raise MLLMError(f"{label} has no pixels: its size is {width} x {height}. Give another image.")
    if width * height > MAX_PIXELS:
        raise MLLMError(f"{label}: {width} x {height} pixels; at most {MAX_PIXELS} are decoded. Make it smaller.")
    with _readable_errors(label):
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            image = _eight_bit(image)
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            white = Image.new("RGBA", rgba.size, "white")
            return Image.alpha_composite(white, rgba).convert("RGB")
        return image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale greyscale of more than 8 bits; in modes ``I`` and ``F``, white is 255 if all values fit, else 65535."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    highest = float(values.max())
    top = 65535.0 if image.mode.startswith("I;16") else next((t for t in (255.0, 65535.0) if highest <= t), highest)
    return Image.fromarray((values.clip(0, top) / top * 255).round().astype(np.uint8))


def _from_array(array: Any) -> Image.Image:
    values = np.asarray(array)
    shape = values.shape
    if values.dtype != np.uint8 or values.ndim not in (2, 3) or (values.ndim == 3 and shape[2] not in (3, 4)):
        raise MLLMError(
            f"The array has shape {shape} and type {values.dtype}; expected uint8 (H, W, 3), (H, W, 4) or (H, W)."
        )
    if values.size == 0:
        raise MLLMError(f"The array has no pixels: its shape is {shape}. Give another image.")
    return _rgb(Image.fromarray(values), "the array")
