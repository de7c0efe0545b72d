"""Open images (files, bytes, arrays, data URLs) as RGB, with limits on bytes and pixels."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from mllm.errors import MLLMError, first_line
from mllm.media.data_urls import from_data_url, is_data_url
from mllm.media.formats import FORMATS, formats_of, suffixes, without_texts
from mllm.media.pixels import from_array, to_rgb
from mllm.system import is_hidden, open_regular, read_regular

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 64_000_000  # checked in the header, before anything is decoded
MAX_SIDE = 65_535  # of JPEG; memory is also needed for every row
SUFFIXES = suffixes()  # of images in a folder


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
        image: a PIL image, an array or a tensor (see `mllm.media.pixels.from_array`), a path, bytes, a data URL, or an
            `ImageSource`.

    Raises:
        MLLMError: it is not an image, is truncated, has too many bytes or pixels, or is of an unsupported type.
    """
    if isinstance(image, Image.Image):
        return _rgb(image, "the image")
    if isinstance(image, ImageSource):
        return image.open()
    if isinstance(image, str) and is_data_url(image):
        return _decode(from_data_url(image, MAX_BYTES), "the data URL")
    if isinstance(image, str | Path):
        return _decode(_read(Path(image)), str(image))
    if isinstance(image, bytes | bytearray | memoryview):
        return _decode(bytes(image), f"the image of {len(image)} bytes")
    if isinstance(image, torch.Tensor):
        values = image.detach().cpu()
        values = values.float() if values.is_floating_point() else values  # numpy has no bfloat16
        return _rgb(from_array(values.numpy(), channels_first=True), "the tensor")
    if hasattr(image, "__array_interface__"):
        return _rgb(from_array(np.asarray(image)), "the array")
    raise MLLMError(
        f"{type(image).__name__} is not an image: expected a PIL image, an array, a tensor, a path, bytes or a "
        "data URL. Convert it to one of them."
    )


def declared_size(image: ImageBytes) -> tuple[int, int]:
    """Return the width and height that a file declares, without decoding it.

    Raises:
        MLLMError: it is not an image, or is too large.
    """
    return _opened(image.data, image.label).size


def source_of(image: Any) -> ImageSource:
    """Return an image of any accepted form as an `ImageSource`."""
    if isinstance(image, ImageSource):
        return image
    if isinstance(image, Path) or (isinstance(image, str) and not is_data_url(image)):
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
        return open_regular(path)
    except OSError as error:
        raise MLLMError(f"The {kind} {path} cannot be read: {error.strerror or error}.") from None


def _read(path: Path) -> bytes:
    _open_file(path, MAX_BYTES, "image").close()
    try:
        return read_regular(path)
    except OSError as error:
        raise MLLMError(f"The image {path} cannot be read: {error.strerror or error}.") from None


def _decode(data: bytes, label: str) -> Image.Image:
    return _rgb(_opened(data, label), label)


def _opened(data: bytes, label: str) -> Image.Image:
    """Return an image that is not decoded yet, after a check of its size."""
    if len(data) > MAX_BYTES:
        raise MLLMError(f"{label}: {len(data)} bytes; at most {MAX_BYTES} are read. Make it smaller.")
    with _readable_errors(label):
        image = Image.open(io.BytesIO(without_texts(data)), formats=formats_of(data, label))
    _check_size(image, label)
    return image


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
    except Exception as error:  # whatever a decoder raises: each has errors of its own
        raise MLLMError(f"{label} is not a readable image: {first_line(error)} Is the file complete?") from None


def _rgb(image: Image.Image, label: str) -> Image.Image:
    """Return an RGB image, after a check of its size."""
    _check_size(image, label)
    with _readable_errors(label):
        return to_rgb(image)


def _check_size(image: Image.Image, label: str) -> None:
    width, height = image.size
    if not width or not height:
        raise MLLMError(f"{label} has no pixels: its size is {width} x {height}. Give another image.")
    if width * height > MAX_PIXELS:
        raise MLLMError(f"{label}: {width} x {height} pixels; at most {MAX_PIXELS} are decoded. Make it smaller.")
    if max(width, height) > MAX_SIDE:
        raise MLLMError(f"{label}: {width} x {height} pixels; a side has at most {MAX_SIDE}. Make it smaller.")
