"""Convert pixels of any kind to 8-bit RGB: upright, transparency on white, more than 8 bits and floats scaled."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from mllm.errors import MLLMError

Array = np.ndarray[Any, Any]

DAMAGED = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError, struct.error, zlib.error)
ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
CHANNELS = (1, 3, 4)
BLOCK = 2**18  # pixels that are scaled at a time
FORMS = "uint8, or floats of 0 to 1 or of 0 to 255; (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), or channels first"


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the first frame of a PIL image as RGB: upright, transparency on white, more than 8 bits scaled to 8."""
    transparent = _transparent(image)  # depends on how the pixels are stored, which is forgotten once they are loaded
    image.load()
    image = _upright(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image, transparent)
    elif transparent != image.info.get("transparency"):
        image = image.copy()
        image.info["transparency"] = transparent
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    rgb = image.convert("RGB")
    rgb.info = {}  # or an orientation that was applied would be applied again
    return rgb


def from_array(values: Array, *, channels_first: bool = False) -> Image.Image:
    """Return an array as a PIL image.

    Args:
        values: ``(H, W)``, ``(H, W, C)`` or ``(C, H, W)`` with 1, 3 or 4 channels. Booleans; ``uint16``, scaled by
            its range; other integers from 0 to 255; or floats, whose white is 1 if none is larger, and else 255.
        channels_first: how a shape is read that can be read both ways, such as ``(3, H, 3)``.

    Raises:
        MLLMError: another shape or type, or values that are neither of 0 to 1 nor of 0 to 255.
    """
    eight_bits = _as_bytes(_channels_last(values, channels_first))
    if eight_bits.size == 0:
        raise MLLMError(f"The array has no pixels: its shape is {values.shape}. Give another image.")
    return Image.fromarray(np.ascontiguousarray(eight_bits))


def _transparent(image: Image.Image) -> Any:
    """Return the value that is declared transparent, in the scale of the decoded pixels.

    Pillow decodes a PNG's grey values of 2 and 4 bits, and colours of 16, to 8 bits, but not the transparent one.
    """
    value = image.info.get("transparency")
    stored = next((tile.args for tile in getattr(image, "tile", ())), None)
    if isinstance(value, int) and stored in ("L;2", "L;4"):
        return value * (85 if stored == "L;2" else 17)
    if isinstance(value, tuple) and stored == "RGB;16B":
        return tuple(channel >> 8 for channel in value)
    return value


def _upright(image: Image.Image) -> Image.Image:
    """Return an image rotated by its EXIF orientation; one whose EXIF data are damaged stays as it is stored."""
    try:
        method = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except DAMAGED:
        return image
    return image if method is None else image.transpose(method)


def _eight_bits(image: Image.Image, transparent: Any) -> Image.Image:
    """Return greyscale of more than 8 bits in 8, with an alpha channel if one of its values is transparent."""
    values = np.asarray(image)
    highest = max(float(block.max()) for _, block in _blocks(values))
    white = 65535.0 if image.mode.startswith("I;16") else _white(highest, floats=image.mode == "F")
    grey, alpha = np.empty(values.shape, np.uint8), np.empty(values.shape, np.uint8)
    for rows, block in _blocks(values):
        grey[rows] = (block.clip(0, white) / white * 255).round()
        if isinstance(transparent, int):
            alpha[rows] = np.where(block == transparent, 0, 255)
    eight_bits = Image.fromarray(grey)
    if isinstance(transparent, int):
        eight_bits.putalpha(Image.fromarray(alpha))
    return eight_bits


def _blocks(values: Array) -> Iterator[tuple[slice, Array]]:
    """Yield a few rows at a time as finite floats, since those of a whole image would take much memory."""
    rows = max(1, BLOCK // values.shape[1])
    for start in range(0, len(values), rows):
        block = slice(start, start + rows)
        yield block, np.nan_to_num(values[block].astype(np.float64))


def _white(highest: float, *, floats: bool) -> float:
    """Return the value of white in an image whose format does not define it: the smallest usual one that is enough.

    Raises:
        MLLMError: the highest of the floats is a little above 1, so either reading would be wrong.
    """
    if floats and 1 < highest < 2:
        raise MLLMError(
            f"The image's floats reach {highest:g}: white is neither 1 nor 255. Clip them to 0 to 1, or scale them."
        )
    usual = ((1.0,) if floats else ()) + (255.0, 65535.0)
    return next((white for white in usual if highest <= white), highest)


def _channels_last(values: Array, channels_first: bool) -> Array:
    """Return an array ``(H, W)``, ``(H, W, 3)`` or ``(H, W, 4)``."""
    if values.ndim == 3:
        first, last = values.shape[0] in CHANNELS, values.shape[2] in CHANNELS
        if first and (channels_first or not last):
            values, last = np.moveaxis(values, 0, 2), True
        if last:
            return values[..., 0] if values.shape[2] == 1 else values
    if values.ndim != 2:
        batch = " It looks like a batch: give its images one by one." if values.ndim == 4 else ""
        raise MLLMError(f"The array has shape {values.shape} and type {values.dtype}; expected {FORMS}.{batch}")
    return values


def _as_bytes(values: Array) -> Array:
    """Return the values as ``uint8``; see `from_array`."""
    if values.dtype == np.uint8 or values.size == 0:
        return values.astype(np.uint8)
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    if values.dtype == np.uint16:
        return (values / 257).round().astype(np.uint8)
    if values.dtype.kind not in "iuf":
        raise MLLMError(f"The array has shape {values.shape} and type {values.dtype}; expected {FORMS}.")
    lowest, highest = float(values.min()), float(values.max())
    if not (lowest >= 0 and highest <= 255):  # NaN too
        raise MLLMError(
            f"The array of shape {values.shape} and type {values.dtype} has values from {lowest:g} to {highest:g}; "
            "expected 0 to 1, or 0 to 255. Undo its normalization, or scale it."
        )
    white = _white(highest, floats=values.dtype.kind == "f")
    return (values.astype(np.float64) / white * 255).round().astype(np.uint8)
