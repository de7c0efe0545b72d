"""Define which image files are read: their formats, their names' endings, and HEIC by the extra ``heif``."""

from __future__ import annotations

import functools
import importlib
import struct
import zlib

from PIL import Image

from mllm.errors import MLLMError

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")  # none of them runs a program
HEIF_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1"}
STILL = (
    b"\x89PNG",
    b"\xff\xd8\xff",
    b"BM",
    b"II*\0",
    b"MM\0*",
    *(b"P%d" % kind for kind in range(1, 7)),
    b"\0\0\0\x0cjP  ",
    b"\xff\x4f\xff\x51",
)
HEIF_SUFFIXES = {".heic", ".heif", ".hif"}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_TEXTS = {b"tEXt", b"zTXt", b"iTXt", b"iCCP"}
ORIENTED = {b"XML:com.adobe.xmp", b"Raw profile type exif"}  # texts that may have the orientation
MAX_TEXT = 2**20  # bytes that Pillow reads


@functools.cache
def suffixes() -> frozenset[str]:
    """Return the endings of the names of image files in a folder, in lower case."""
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO")}
    return frozenset(known | HEIF_SUFFIXES)


def is_heif(data: bytes) -> bool:
    """Whether a file begins as HEIC and HEIF files do."""
    return data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS


def is_still(data: bytes) -> bool:
    """Whether a file begins as an image does, of which one frame is read; a GIF may be a video."""
    if data[4:8] == b"ftyp":
        return data[8:12] in HEIF_BRANDS | {b"avif", b"avis"}
    if data[:4] == b"RIFF":
        return data[8:12] == b"WEBP"
    return data.startswith(STILL)


def formats_of(data: bytes, label: str) -> tuple[str, ...]:
    """Return the formats that a file may be of, for `PIL.Image.open`.

    Raises:
        MLLMError: it is a HEIC image, and the extra ``heif`` is not installed.
    """
    if not is_heif(data):
        return FORMATS
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        if data[8:12] in (b"mif1", b"msf1"):  # may be an AVIF image, which Pillow reads
            return FORMATS
        raise MLLMError(
            f"{label} is a HEIC image; reading it needs pillow-heif: pip install 'mllm-assembly[heif]'. "
            "Or convert it to JPEG."
        ) from None
    return (*FORMATS, "HEIF")


def without_texts(data: bytes) -> bytes:
    """Return a PNG file without its texts and colour profile, which do not change a pixel here.

    Pillow limits their size, and refuses the whole image where they are longer. Texts that may have the orientation
    stay. Data of any other format, or damaged, are returned as they are.
    """
    if not data.startswith(PNG_SIGNATURE):
        return data
    kept, start = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while start + 12 <= len(data):
        (length,) = struct.unpack(">I", data[start : start + 4])
        end, kind = start + 12 + length, data[start + 4 : start + 8]
        if kind not in PNG_TEXTS or _is_orientation(kind, data[start + 8 : end - 4]):
            kept.append(data[start:end])
        start = end
    return b"".join([*kept, data[start:]])


def _is_orientation(kind: bytes, chunk: bytes) -> bool:
    """Whether a text may have the orientation, and is not longer than Pillow reads."""
    keyword, _, rest = chunk.partition(b"\0")
    if keyword not in ORIENTED:
        return False
    packed = rest[1:] if kind == b"zTXt" else b""
    if kind == b"iTXt" and rest[:1] == b"\1":
        packed = rest[2:].split(b"\0", 2)[-1]
    try:
        return len(rest) < MAX_TEXT and len(zlib.decompressobj().decompress(packed, MAX_TEXT)) < MAX_TEXT
    except zlib.error:
        return False
