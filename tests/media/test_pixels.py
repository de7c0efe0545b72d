"""Test that pixels of every kind come back as 8-bit RGB, compared with values computed by hand or by bare Pillow."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin, features

from mllm.errors import MLLMError
from mllm.media.images import SUFFIXES, find_images, open_image, source_of

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = PIXELS[..., 0]
ORIENTATION = 0x0112


def pixels(image: Any) -> np.ndarray[Any, Any]:
    opened = open_image(image)
    assert opened.mode == "RGB"
    return np.asarray(opened)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def first(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return channels first."""
    return np.ascontiguousarray(values.transpose(2, 0, 1))


ARRAYS = {
    "bytes": PIXELS,
    "channels-first": first(PIXELS),
    "int64": PIXELS.astype(np.int64),
    "uint16": PIXELS.astype(np.uint16) * 257,
    "floats-of-0-to-1": (PIXELS / 255).astype(np.float32),
    "float64-of-0-to-1": PIXELS / 255,
    "float16-of-0-to-1": (PIXELS / 255).astype(np.float16),
    "floats-of-0-to-255": PIXELS.astype(np.float32),
    "floats-channels-first": first(PIXELS / 255),
    "opaque-rgba": np.dstack([PIXELS, np.full((5, 7), 255, dtype=np.uint8)]),
    "reversed-view": PIXELS[::-1, ::-1].copy()[::-1, ::-1],
    "tensor": torch.from_numpy(PIXELS),
    "tensor-channels-first": torch.from_numpy(first(PIXELS)),
    "tensor-of-0-to-1": torch.from_numpy(first(PIXELS)) / 255,
    "tensor-of-0-to-255": torch.from_numpy(first(PIXELS)).float(),
    "tensor-bfloat16": torch.from_numpy(PIXELS).to(torch.bfloat16),  # has every integer up to 256
    "tensor-with-gradient": (torch.from_numpy(first(PIXELS)) / 255).requires_grad_(),
    "bytearray": bytearray(encoded(Image.fromarray(PIXELS))),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_or_tensor_of_every_kind_gives_the_same_pixels(name: str) -> None:
    assert np.array_equal(pixels(ARRAYS[name]), PIXELS)
    assert source_of(ARRAYS[name]).key() == source_of(PIXELS).key()


@pytest.mark.parametrize("values", [GREY, GREY[..., None], GREY[None], GREY / 255, torch.from_numpy(GREY)[None] / 255])
def test_grey_arrays(values: Any) -> None:
    assert np.array_equal(pixels(values), np.repeat(GREY[..., None], 3, axis=2))


def test_a_mask_is_black_and_white() -> None:
    assert np.array_equal(pixels(GREY > 99)[..., 1], np.where(GREY > 99, 255, 0))


def test_a_shape_that_can_be_read_both_ways_is_read_as_arrays_and_tensors_usually_are() -> None:
    values = RANDOM.integers(0, 256, (3, 6, 3), dtype=np.uint8)
    assert np.array_equal(pixels(values), values)
    assert np.array_equal(pixels(torch.from_numpy(values)), values.transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param((PIXELS / 255 - 0.5) / 0.5, "expected 0 to 1, or 0 to 255. Undo its normalization", id="normal"),
        pytest.param(torch.randn(3, 8, 8), "Undo its normalization", id="tensor"),
        pytest.param(np.full((4, 4), np.nan), "expected 0 to 1, or 0 to 255", id="NaN"),
        pytest.param(np.full((4, 4), np.inf), "expected 0 to 1, or 0 to 255", id="inf"),
        pytest.param(np.full((4, 4, 3), 1.02), "reach 1.02: white is neither 1 nor 255", id="overshoot"),
        pytest.param(torch.rand(2, 3, 8, 8), "looks like a batch: give its images one by one", id="batch"),
        pytest.param(np.zeros((0, 4, 3)), "no pixels", id="empty"),
    ],
)
def test_values_that_could_mean_two_things_are_refused(values: Any, message: str) -> None:
    with pytest.raises(MLLMError, match=message):
        open_image(values)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, depth: int, colour: int, row: bytes, *chunks: bytes) -> bytes:
    """Return a PNG of one row, written by hand."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + data + chunk(b"IEND", b"")


def transparent(*values: int) -> bytes:
    return chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))


@pytest.mark.parametrize(
    ("data", "expected"),
    [  # PNG specification, 11.3.2.1: the transparent value is a sample of the image's own depth
        pytest.param(png(2, 1, 0, b"\x40", transparent(0)), [255, 255], id="1-bit"),
        pytest.param(png(4, 2, 0, b"\x1b", transparent(2)), [0, 85, 255, 255], id="2-bits"),
        pytest.param(png(4, 4, 0, b"\x01\x23", transparent(2)), [0, 17, 255, 51], id="4-bits"),
        pytest.param(png(3, 8, 0, b"\0\x07\x08", transparent(7)), [0, 255, 8], id="8-bits"),
        pytest.param(png(3, 16, 0, b"\0\0\x07\x07\x08\x08", transparent(0x0707)), [0, 255, 8], id="16-bits"),
        pytest.param(png(2, 16, 0, b"\x07\x07\x07\x08", transparent(0x0707)), [255, 7], id="16-bits-low-byte"),
        pytest.param(png(2, 8, 2, b"\x01\x02\x03\x04\x05\x06", transparent(1, 2, 3)), [255, 4], id="RGB"),
        pytest.param(
            png(
                2, 16, 2, struct.pack(">6H", 0x0180, 0x0280, 0x0380, 0x0480, 0, 0), transparent(0x0180, 0x0280, 0x0380)
            ),
            [255, 4],
            id="RGB-16-bits",
        ),
    ],
)
def test_the_transparent_value_of_a_png_is_white_at_every_depth(data: bytes, expected: list[int]) -> None:
    assert pixels(data)[0, :, 0].tolist() == expected


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_half_transparent_pixels_are_mixed_with_white(mode: str) -> None:
    alpha = np.linspace(0, 255, GREY.size).astype(np.uint8).reshape(GREY.shape)
    rgba = np.dstack([GREY, GREY, GREY, alpha])
    image = Image.fromarray(rgba).convert("LA")
    if mode == "RGBA":
        image = Image.fromarray(rgba)
    elif mode in ("P", "PA"):
        image = Image.fromarray(rgba).quantize(256)
        if mode == "PA":
            image = image.convert("PA")
            rgba = np.asarray(image.convert("RGBA"))
    tolerance = 6 if mode == "P" else 1  # quantized
    opacity = rgba[..., 3:] / 255
    expected = rgba[..., :3] * opacity + 255 * (1 - opacity)
    assert np.abs(pixels(image) - expected).max() <= tolerance
    if mode != "PA":
        assert np.array_equal(pixels(encoded(image)), pixels(image))


def xmp(orientation: int) -> bytes:
    return f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()


def raw_exif(orientation: int) -> bytes:
    """Return EXIF data as ImageMagick writes them into a text."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = exif.tobytes()
    return b"\nexif\n%8d\n" % len(data) + data.hex().encode() + b"\n"


KEYWORD, RAW = b"XML:com.adobe.xmp\0", b"Raw profile type exif\0"
ORIENTED = {
    "eXIf": chunk(b"eXIf", bytes.fromhex("4d4d002a00000008000101120003000000010006000000000000")),
    "XMP": chunk(b"iTXt", KEYWORD + b"\0\0\0\0" + xmp(6)),
    "XMP-compressed": chunk(b"iTXt", KEYWORD + b"\1\0\0\0" + zlib.compress(xmp(6))),
    "tEXt": chunk(b"tEXt", RAW + raw_exif(6)),
    "zTXt": chunk(b"zTXt", RAW + b"\0" + zlib.compress(raw_exif(6))),
}


@pytest.mark.parametrize("place", ORIENTED)
def test_the_orientation_is_found_wherever_a_png_has_it(place: str) -> None:
    data = png(3, 8, 0, b"\x01\x02\x03", ORIENTED[place], chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 2**21)))
    bare = png(3, 8, 0, b"\x01\x02\x03", ORIENTED[place])
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(bare))).convert("RGB"))
    assert expected.shape == (3, 1, 3)
    assert np.array_equal(pixels(data), expected)


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP", "tEXt"])
@pytest.mark.parametrize("last", [False, True])
def test_texts_and_profiles_of_any_size_do_not_hide_the_pixels(kind: str, last: bool) -> None:
    long = b"x" * 70 * 2**20  # more than Pillow reads of all texts together
    body = {
        "zTXt": b"a\0\0" + zlib.compress(long),
        "iTXt": b"a\0\1\0\0\0" + zlib.compress(long),
        "iCCP": b"a\0\0" + zlib.compress(long),
        "tEXt": b"a\0" + b"x" * 2**20,
    }[kind]
    note = chunk(kind.encode(), body) * (1 if kind != "tEXt" else 5)
    data = png(3, 8, 0, b"\x01\x02\x03")
    end = data.index(b"IEND") - 4 if last else data.index(b"IDAT") - 4
    assert pixels(data[:end] + note + data[end:])[0, :, 0].tolist() == [1, 2, 3]


def test_an_image_that_was_opened_is_not_rotated_again() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    once = open_image(encoded(Image.fromarray(PIXELS), exif=exif))
    assert np.array_equal(np.asarray(once), np.rot90(PIXELS, -1))
    assert np.array_equal(pixels(once), np.asarray(once)) and np.array_equal(pixels(encoded(once)), np.asarray(once))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # by bare Pillow
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0II*\0\xff\xff\xff\xff"]
)
def test_damaged_exif_data_do_not_hide_the_pixels(kind: str, exif: bytes) -> None:
    data = encoded(Image.fromarray(PIXELS), kind, exif=exif)
    assert np.array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow was built without AVIF")
@pytest.mark.parametrize("orientation", [1, 6])
def test_avif_is_read_as_pillow_reads_it(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(Image.fromarray(PIXELS).resize((40, 24)), "AVIF", quality=90, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(pixels(data), np.asarray(expected))


def test_heic_needs_the_extra_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    file = tmp_path / "photo.heic"
    file.write_bytes(struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + bytes(64))
    assert find_images([tmp_path]) == [file]
    with pytest.raises(MLLMError, match=r"photo.heic is a HEIC image.*pip install 'mllm-assembly\[heif\]'"):
        open_image(file)
    file.write_bytes(struct.pack(">I", 24) + b"ftypmif1\0\0\0\0mif1miaf" + bytes(64))
    with pytest.raises(MLLMError, match=r"photo\.heic is not a readable image"):
        open_image(file)


def test_heic_is_read_with_the_extra() -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    data = encoded(Image.new("RGB", (40, 24), (200, 60, 30)), "HEIF", quality=95)
    assert np.abs(pixels(data).astype(int) - (200, 60, 30)).max() <= 8 and pixels(data).shape == (24, 40, 3)


def test_a_folder_lists_every_ending_that_pillow_knows_for_the_formats(tmp_path: Any) -> None:
    names = {"a.jfif": "JPEG", "b.JPE": "JPEG", "c.apng": "PNG", "d.pgm": "PPM", "e.avif": "AVIF", "f.j2k": "JPEG2000"}
    for name, kind in names.items():
        image = Image.fromarray(GREY if kind == "PPM" else PIXELS)
        (tmp_path / name).write_bytes(encoded(image, kind))
    for name in ("notes.txt", "film.mpg", "page.eps", "page.pdf"):
        (tmp_path / name).write_text("no image")
    listed = find_images([tmp_path])
    assert [path.name for path in listed] == sorted(names)
    assert {pixels(path).shape for path in listed} == {PIXELS.shape}
    assert {".jfif", ".mpo", ".heic"} < SUFFIXES and not SUFFIXES & {".eps", ".pdf", ".mpg", ".wmf"}


def test_texts_written_by_pillow_are_left_out_and_the_rest_is_unchanged() -> None:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("parameters", "x" * 2**21, zip=True)
    notes.add_itxt("Comment", "é" * 2**21, zip=True)
    data = encoded(Image.fromarray(PIXELS), pnginfo=notes, icc_profile=RANDOM.bytes(3 * 2**20), dpi=(300, 300))
    assert np.array_equal(pixels(data), PIXELS)


DATA = encoded(Image.fromarray(PIXELS))


def urls() -> dict[str, str]:
    text = base64.b64encode(DATA).decode()
    return {
        "plain": f"data:image/png;base64,{text}",
        "lines": "data:image/png;base64," + "\r\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
        "spaces-around": f" data:image/png;base64, {text} \n",
        "no-padding": f"data:image/png;base64,{text.rstrip('=')}",
        "more-padding": f"data:image/png;base64,{text.rstrip('=')}====",
        "url-alphabet": f"data:image/png;base64,{base64.urlsafe_b64encode(DATA).decode()}",
        "percent-encoded": f"data:image/png;base64,{text.replace('+', '%2B').replace('/', '%2F').replace('=', '%3D')}",
        "no-media-type": f"data:;base64,{text}",
        "another-media-type": f"data:text/plain;charset=utf-8;base64,{text}",
        "capitals": f"DATA:image/PNG;BASE64,{text}",
    }


@pytest.mark.parametrize("form", urls())
def test_a_data_url_in_every_form_that_clients_write(form: str) -> None:
    assert any(character in urls()["plain"] for character in "+/"), "the alphabets differ"
    assert np.array_equal(pixels(urls()[form]), PIXELS)
    assert source_of(urls()[form]).key() == source_of(PIXELS).key()


@pytest.mark.parametrize("body", ["a", "ab\0cd", "äöü=", "a=b=", "%zz", "*", "data:image/png;base64,"])
def test_what_is_no_base64_is_one_message(body: str) -> None:
    with pytest.raises(MLLMError, match=r"base64|not a readable image"):
        open_image(f"data:image/png;base64,{body}")
