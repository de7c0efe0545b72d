"""Fuzz images: every format, cut, flipped, with headers that lie, in odd modes; compared with bare Pillow."""

from __future__ import annotations

import base64
import functools
import io
import os
import random
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mllm.media.images import MAX_PIXELS, MAX_SIDE, ImageFile, find_images, open_image
from tests.fuzz.harness import Act
from tests.fuzz.mutate import damaged

SAVED = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "GIF": ("L", "P", "RGB"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F", "I", "LAB", "YCbCr"),
    "PPM": ("1", "L", "RGB"),
    "JPEG2000": ("L", "RGB", "RGBA"),
    "AVIF": ("RGB", "RGBA"),
    "ICO": ("RGBA",),
    "PDF": ("RGB",),
    "EPS": ("RGB",),
    "TGA": ("RGB",),
    "PCX": ("RGB",),
    "ICNS": ("RGBA",),
    "DDS": ("RGB",),
}
TIFF_KINDS = ("raw", "tiff_lzw", "tiff_deflate", "packbits", "jpeg")
DEVICES = ("/dev/zero", "/dev/random", "/proc/kmsg", "/dev/tty", "/dev/stdin", "/proc/self/mem", "/dev/null")


def _plain(mode: str, chance: random.Random) -> Image.Image:
    """Return a small image of a mode."""
    size = chance.choice(((1, 1), (7, 5), (40, 32), (3, 200)))
    pixels = np.frombuffer(chance.randbytes(size[0] * size[1] * 4), np.uint8).reshape(size[1], size[0], 4)
    image = Image.fromarray(pixels)
    if mode in ("I;16", "I", "F"):
        values = pixels[..., 0].astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]) * 257
        return Image.fromarray(values)
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def _encoded(chance: random.Random) -> tuple[str, bytes]:
    """Return an image file of a random format and mode."""
    kind = chance.choice(list(SAVED)[: 9 if chance.random() < 0.9 else None])
    mode = chance.choice(SAVED[kind])
    image, buffer, options = _plain(mode, chance), io.BytesIO(), dict[str, Any]()
    if kind in ("GIF", "PNG", "WEBP", "TIFF") and mode not in ("I;16", "F", "I") and chance.random() < 0.3:
        options = {"save_all": True, "append_images": [image.transpose(Image.Transpose.ROTATE_180)] * 3}
    if kind == "JPEG":
        options = {"progressive": chance.random() < 0.5, "quality": chance.choice((1, 50, 100))}
    if kind == "TIFF" and mode in ("L", "RGB") and chance.random() < 0.6:
        options = {"compression": chance.choice(TIFF_KINDS)}
    if kind in ("PNG", "JPEG", "WEBP", "TIFF") and chance.random() < 0.4:
        exif = Image.Exif()
        exif[0x0112] = chance.randrange(10)
        options["exif"] = exif
    if kind == "PNG" and mode in ("L", "RGB", "P") and chance.random() < 0.3:
        options["transparency"] = {"L": 3, "P": 3, "RGB": (1, 2, 3)}[mode]
    image.save(buffer, kind, **options)
    return f"{kind} {mode} {sorted(options)}", buffer.getvalue()


def png(width: int, height: int, *, depth: int = 8, colour: int = 0, rows: int | None = None) -> bytes:
    """Return a PNG file whose header declares a size, with so many rows of zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 1)
    row = bytes((width * depth * channels + 7) // 8 + 1)
    packer = zlib.compressobj(1)
    packed = b"".join(packer.compress(row) for _ in range(height if rows is None else rows)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def expected(data: bytes) -> Image.Image | None:
    """Return what bare Pillow makes of a file, on white; None where it cannot, or where this package scales pixels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image: Image.Image = Image.open(io.BytesIO(data))
            image.load()
            if image.mode[0] in "IF" or "transparency" in image.info:
                return None
            orientation = image.getexif().get(0x0112, 1)
    except Exception:
        return None
    if orientation != 1:
        return None
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def check_image(source: Any, data: bytes | None = None) -> None:
    """Open an image: its form is right, and its pixels are those of bare Pillow, where that has an opinion."""
    image = open_image(source)
    assert image.mode == "RGB", image.mode
    assert 0 < image.width * image.height <= MAX_PIXELS and max(image.size) <= MAX_SIDE, image.size
    if data is not None and image.width * image.height < 10**6:
        bare = expected(data)
        assert bare is None or (bare.size == image.size and bare.tobytes() == image.tobytes()), "other pixels"


class Images:
    """Images as files, bytes, data URLs, arrays and tensors."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def named(self) -> dict[str, Act]:
        """Return the cases that gave way once, and their neighbours."""
        contents = {
            "64,000,000 rows": png(1, 64_000_000, depth=1, rows=100),
            "64 million pixels": png(8000, 8000, depth=1),
            "65,535 rows": png(900, 65_535, depth=1),
            "many columns": png(65_535, 900, depth=1),
            "more pixels than are decoded": png(8001, 8000, depth=1, rows=1),
            "2^31 columns": png(2**31 - 1, 1, depth=1, rows=0),
            "no columns": png(0, 5),
            "no rows": png(5, 0),
            "too few rows": png(50, 50, rows=3),
            "colour 3 without a palette": png(5, 5, colour=3),
            "depth 7": png(5, 5, depth=7),
            "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n",
            "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
            "empty": b"",
            "one byte": b"\x89",
            "a text": b"not an image" * 100,
            "64 MiB and more": b"\x89PNG\r\n\x1a\n" + bytes(64 * 2**20),
            "PPM of text with huge numbers": b"P3 9999999999999999999 1 255 1 1 1",
            "PPM with a comment without an end": b"P6 #" + b"x" * 1_000_000,
            "GIF of many frames": _frames(),
            "a deep TIFF": _tiff_circle(),
        }
        acts: dict[str, Act] = {
            name: functools.partial(check_image, data, data) for name, data in contents.items() if len(data) < 2**26
        }
        acts["64 MiB and more"] = functools.partial(check_image, contents["64 MiB and more"])
        paths = [*DEVICES, "x" * 300, "x" * 5000, "a\0b", "", ".", "..", "~", "http://[::1", "file:///etc/passwd"]
        acts |= {f"path {path[:20]!r}": functools.partial(check_image, path) for path in paths}
        acts["a pipe"] = self._pipe
        acts |= {f"value {value!r}"[:60]: functools.partial(check_image, value) for value in VALUES}
        return acts

    def draw(self, chance: random.Random) -> tuple[str, Act]:
        """Return an image of any form, mostly a damaged file."""
        if chance.random() < 0.12:
            return _array(chance)
        label, data = _encoded(chance)
        if chance.random() < 0.1:
            other, more = _encoded(chance)
            start = chance.randrange(len(data))
            label, data = f"{label} + {other}", data[:start] + more[chance.randrange(len(more)) :]
        elif chance.random() < 0.93:
            data = damaged(data, chance)
        form = chance.choice(("bytes", "file", "data URL"))
        return f"{form}: {label}", functools.partial(self._open, data, form, chance.randrange(10**9))

    def _open(self, data: bytes, form: str, number: int) -> None:
        if form == "bytes":
            check_image(data, data)
        elif form == "data URL":
            check_image(f"data:image/png;base64,{base64.b64encode(data).decode()}", data)
        else:
            path = self._folder / f"{number}.png"
            path.write_bytes(data)
            try:
                ImageFile(path).key()
                assert find_images([path]) == [path]
                check_image(path, data)
            finally:
                path.unlink()

    def _pipe(self) -> None:
        path = self._folder / "pipe.png"
        os.mkfifo(path)
        try:
            check_image(path)
        finally:
            path.unlink()


def _frames() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("L", (64, 64), number % 256) for number in range(500)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def _tiff_circle() -> bytes:
    """Return a TIFF whose directory is followed by itself."""
    entries = [(256, 4, 1, 4), (257, 4, 1, 4), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8),
               (278, 4, 1, 4), (279, 4, 1, 16)]  # fmt: skip
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", 8) + bytes(16)


VALUES: list[Any] = [None, 3, 1.5, True, {}, [], ["a.png"], {"url": "a.png"}, object(), b"", "data:", "data:,x",
                     "data:image/png;base64", "data:image/png;base64,%%%", "data:;base64,é"]  # fmt: skip
TYPES: tuple[Any, ...] = (np.uint8, np.uint16, np.int64, np.float16, np.float32, np.float64, np.bool_, np.complex64,
                          "datetime64[s]", "U3", object)  # fmt: skip


def _array(chance: random.Random) -> tuple[str, Act]:
    """Return an array or tensor of a random shape and type, with values that may be NaN."""
    shape = tuple(chance.choice((0, 1, 2, 3, 4, 5, 40)) for _ in range(chance.choice((0, 1, 2, 3, 3, 3, 4, 5))))
    kind = chance.choice(TYPES)
    values = np.zeros(shape, kind)
    if values.size and values.dtype.kind in "iuf":
        values.flat[0] = chance.choice((0, 1, 255, 100))
        if values.dtype.kind == "f":
            values.flat[-1] = chance.choice((0.5, float("nan"), float("inf"), -1.0, 1e30 if kind != np.float16 else 2))
    make: Callable[[Any], Any] = chance.choice((torch.from_numpy, lambda array: array))
    try:
        source = make(values)
    except TypeError:
        source = values
    return f"{type(source).__name__} {shape} {kind}", functools.partial(check_image, source)
