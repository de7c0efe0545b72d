"""Read an image's size without decoding its pixels: from the header, upright as its EXIF orientation says."""

from __future__ import annotations

import functools
import io
import os
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from mllm.media.formats import formats_of
from mllm.media.images import ImageBytes, ImageFile, ImageSource, declared_size, open_image
from mllm.media.pixels import DAMAGED, ORIENTATION
from mllm.system import open_regular

HEADER = 64  # bytes, of which the format is known
PNG = b"\x89PNG\r\n\x1a\n"
TEXTS = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")  # chunks of a PNG
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


def size_of(image: Any) -> tuple[int, int]:
    """Return width and height of an image of any accepted form, as `mllm.media.images.open_image` would open it.

    A source that knows its size has it as an attribute ``size``; one that does not, and is no file, is opened once.

    Raises:
        MLLMError: it cannot be read.
    """
    if isinstance(image, Image.Image):
        return _upright(image)
    if isinstance(image, ImageFile | Path):
        path = image.path if isinstance(image, ImageFile) else image
        try:
            state = os.stat(path)
        except OSError:
            return open_image(path).size  # which says what is wrong
        return _file_size(path, state.st_mtime_ns, state.st_size)
    if isinstance(image, ImageBytes):
        return _header_size(io.BytesIO(image.data), image.label) or image.open().size
    if isinstance(size := getattr(image, "size", None), tuple) and len(size) == 2:
        return size
    if isinstance(loaded := getattr(image, "image", None), Image.Image):
        return loaded.size
    source: Any = image
    return _opened_size(source) if isinstance(image, ImageSource) else open_image(image).size


def pixels_of(image: Any) -> int:
    """Return the number of pixels of an image of any accepted form; bytes are not decoded for it.

    Raises:
        MLLMError: it is not an image, or too large.
    """
    width, height = declared_size(image) if isinstance(image, ImageBytes) else size_of(image)
    return width * height


def label_of(image: Any) -> str:
    """Return the name of an image or a video for messages; one without a name is described by its size."""
    if isinstance(path := getattr(image, "path", image), Path):
        return str(path)
    if isinstance(label := getattr(image, "label", None), str):
        return label
    width, height = size_of(image)
    return f"the image of {width} x {height} pixels"


@functools.lru_cache(maxsize=65536)
def _file_size(path: Path, changed: int, length: int) -> tuple[int, int]:
    """Return the size of the image in a file; ``changed`` and ``length``: of the file, so that a new one is read."""
    try:
        with open_regular(path) as file:
            size = _header_size(file, str(path))
    except OSError:
        size = None
    return size or open_image(path).size


@functools.lru_cache(maxsize=65536)
def _opened_size(source: Any) -> tuple[int, int]:
    return source.open().size


def _header_size(file: Any, label: str) -> tuple[int, int] | None:
    """Return the size that an image's header has; None: Pillow refuses it, which may be no fault of the pixels."""
    try:
        formats = formats_of(file.read(HEADER), label)
        file.seek(0)
        with Image.open(file, formats=formats) as image:
            return _upright(image)
    except Exception:  # whatever a decoder raises
        return None


def _upright(image: Image.Image) -> tuple[int, int]:
    try:
        # The method of a PNG decodes the pixels, to find Exif that stands behind them.
        ends_early = isinstance(image, PngImageFile) and not _text_behind_pixels(image.fp)
        exif = Image.Image.getexif(image) if ends_early else image.getexif()
        sideways = exif.get(ORIENTATION) in SIDEWAYS
    except DAMAGED:
        sideways = False
    return (image.height, image.width) if sideways else image.size


def _text_behind_pixels(file: Any) -> bool:
    """Whether a PNG has chunks that may hold Exif behind its pixels; the file's position does not change."""
    if file is None:  # the pixels are decoded already
        return True
    start, in_pixels = file.tell(), False
    try:
        file.seek(len(PNG))
        while len(header := file.read(8)) == 8:
            if in_pixels and header[4:] in TEXTS:
                return True
            in_pixels |= header[4:] == b"IDAT"
            file.seek(int.from_bytes(header[:4]) + 4, os.SEEK_CUR)  # the chunk and its checksum
        return False
    finally:
        file.seek(start)
