"""Images as cameras and programs write them, compared with what Pillow decodes or with pixels written by hand."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from mllm.errors import MLLMError
from mllm.media.images import open_image

BLUE, RED, GREY, WHITE = (30, 30, 200), (200, 30, 30), (128, 128, 128), (255, 255, 255)
BLUE_RED = Image.new("RGB", (32, 16), RED)
BLUE_RED.paste(BLUE, (0, 0, 16, 16))
ORIENTATION = 0x0112
GRADIENT = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (8, 1))
GRADIENT_8_BIT = (GRADIENT / 257).round()
FLOATS = Image.fromarray(np.tile(np.linspace(0, 1, 64, dtype=np.float32), (8, 1)))


def written(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(source: Any) -> np.ndarray[Any, Any]:
    """Return the pixels ``(H, W, 3)`` of what is opened."""
    image = open_image(source)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def assert_close(pixels: Any, expected: Any, tolerance: float) -> None:
    np.testing.assert_allclose(pixels, np.broadcast_to(expected, pixels.shape), atol=tolerance, rtol=0)


def oriented(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return written(BLUE_RED, kind, exif=exif, **({"quality": 95} if kind in ("JPEG", "WEBP") else {}))


# EXIF orientation, which phones write instead of turning the pixels.


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_that_of_pillow(kind, orientation):
    data = oriented(kind, orientation)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert_close(opened(data), np.asarray(expected), 3)


def test_exif_orientation_6_turns_clockwise():
    pixels = opened(oriented("JPEG", 6))
    assert pixels.shape == (32, 16, 3)
    assert_close(pixels[2, 8], BLUE, 6)  # it was on the left, and is on top


def test_the_server_sees_an_image_with_an_exif_orientation_upright(model_of, serve, data_url):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    turned = data_url(BLUE_RED, "JPEG", exif=exif, quality=95)
    upright = data_url(open_image(oriented("JPEG", 6)))

    def answer(url: str) -> str:
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
        return str(serve(model_of()).answer(content, max_tokens=8))

    assert answer(turned) == answer(upright)


# More than 8 bits.


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(written(Image.fromarray(GRADIENT), "PNG"), id="PNG"),
        pytest.param(written(Image.fromarray(GRADIENT), "TIFF"), id="TIFF"),
        pytest.param(Image.fromarray(GRADIENT), id="PIL-I16"),
        pytest.param(Image.fromarray(GRADIENT.astype(np.int32)), id="PIL-I"),
    ],
)
def test_16_bit_grey_is_scaled_to_8_bit(source):
    assert_close(opened(source), GRADIENT_8_BIT[..., None], 1)


@pytest.mark.parametrize("source", [pytest.param(FLOATS, id="PIL"), pytest.param(written(FLOATS, "TIFF"), id="TIFF")])
def test_floats_of_0_to_1_are_scaled_to_8_bit(source):
    assert_close(opened(source), np.asarray(FLOATS)[..., None] * 255, 0.5)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, color_type: int, rows: bytes, extra: bytes = b"") -> bytes:
    """Return a PNG written by hand: Pillow writes no such depths."""
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + data + chunk(b"IEND", b"")


RGB_16 = (b"\0" + struct.pack(">HHH", 65535, 32896, 0) * 8) * 4
GREY_HALF_TRANSPARENT = (b"\0" + struct.pack(">HH", 32896, 32768) * 8) * 4
GREY_16 = (b"\0" + struct.pack(">H", 32896) * 8) * 4
GREY_IS_TRANSPARENT = chunk(b"tRNS", struct.pack(">H", 32896))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        pytest.param(png(8, 4, 16, 2, RGB_16), (255, 128, 0), id="RGB-16"),
        pytest.param(png(8, 4, 16, 4, GREY_HALF_TRANSPARENT), (192, 192, 192), id="LA-16-on-white"),
        pytest.param(png(8, 4, 16, 0, GREY_16, GREY_IS_TRANSPARENT), WHITE, id="L-16-transparent-grey"),
    ],
)
def test_a_png_of_16_bits(source, expected):
    assert_close(opened(source), expected, 2)


def test_a_png_of_1_bit():
    pixels = opened(png(8, 4, 1, 0, b"\0\x0f" * 4))
    assert_close(pixels[:, :4], 0, 0)
    assert_close(pixels[:, 4:], 255, 0)


# Other colour models.

CMYK = Image.new("CMYK", (8, 8), (0, 255, 255, 0))


@pytest.mark.parametrize("source", [CMYK, written(CMYK, "JPEG", quality=95)], ids=["PIL", "JPEG"])
def test_cmyk(source):
    assert_close(opened(source), (255, 0, 0), 20)


@pytest.mark.parametrize(
    ("source", "tolerance"),
    [
        pytest.param(written(BLUE_RED.convert("YCbCr"), "JPEG", quality=95), 8, id="YCbCr-JPEG"),
        pytest.param(written(BLUE_RED.convert("LAB"), "TIFF"), 20, id="LAB-TIFF"),
        pytest.param(BLUE_RED.convert("HSV"), 8, id="HSV-PIL"),
    ],
)
def test_other_colour_models_come_back_as_rgb(source, tolerance):
    assert_close(opened(source)[2, 2], BLUE, tolerance)
    assert_close(opened(source)[2, 29], RED, tolerance)


def test_transparent_black_is_white():
    assert_close(opened(written(Image.new("LA", (8, 8), (0, 0)), "PNG")), WHITE, 0)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_the_transparent_colour_of_a_palette_is_white(kind):
    palette = BLUE_RED.quantize(4)
    pixels = opened(written(palette, kind, transparency=palette.getpixel((1, 1))))
    assert_close(pixels[1, 1], WHITE, 0)
    assert_close(pixels[1, 30], RED, 10)


@pytest.mark.parametrize("kind", ["WEBP", "GIF", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_taken(kind):
    red, *others = (Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
    lossless = {"lossless": True} if kind == "WEBP" else {}
    assert_close(opened(written(red, kind, save_all=True, append_images=others, **lossless)), (255, 0, 0), 1)


@pytest.mark.parametrize("mode", ["PA", "La", "RGBa", "RGBX", "1", "I;16B", "I;16L"])
def test_an_empty_image_of_a_rare_mode_is_opened_or_refused(mode):
    with contextlib.suppress(MLLMError):
        pixels = opened(Image.new(mode, (8, 8)))
        assert_close(pixels, WHITE if mode in ("PA", "RGBa") else (0, 0, 0), 0)


# Files that are more, or less, than one image.

NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
JPEG = written(Image.fromarray(NOISE), "JPEG", quality=95)


def test_an_mpo_is_its_first_image():
    smaller = BLUE_RED.resize((16, 8))
    data = written(BLUE_RED, "MPO", save_all=True, append_images=[smaller], quality=95)
    assert_close(opened(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), 3)
    assert opened(data).shape == (16, 32, 3)


def test_a_jpeg_that_is_cut_in_half_is_refused():
    with pytest.raises(MLLMError):
        open_image(JPEG[: len(JPEG) // 2])


def test_a_jpeg_without_its_end_marker_is_opened_or_refused():
    with contextlib.suppress(MLLMError):
        assert_close(opened(JPEG[:-2]), opened(JPEG), 0)


def test_bytes_behind_a_jpeg_do_no_harm():
    assert_close(opened(JPEG + b"\0" * 100), opened(JPEG), 0)


def noted() -> dict[str, Any]:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("parameters", "x" * 2 * 2**20, zip=True)
    return {"pnginfo": notes}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(noted(), id="2-MB-of-text"),
        pytest.param({"icc_profile": os.urandom(3 * 2**20)}, id="3-MB-of-profile"),
    ],
)
def test_a_png_with_much_beside_its_pixels_is_opened(options):
    assert_close(opened(written(BLUE_RED, "PNG", **options)), np.asarray(BLUE_RED), 0)


def test_a_header_of_900_million_pixels_is_refused():
    with pytest.raises(MLLMError):
        open_image(png(30000, 30000, 8, 2, b""))
