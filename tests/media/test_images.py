"""Test that images in every accepted form give the right RGB pixels, and anything else a message that names it."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from mllm.errors import MLLMError
from mllm.media import images
from mllm.media.images import ImageSource, open_image, source_of

# Two rows, three columns, all different, so that a flip, a rotation or a swap of channels is detected.
PIXELS = np.array(
    [[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[10, 20, 30], [200, 100, 50], [255, 255, 255]]], dtype=np.uint8
)
IMAGE = Image.fromarray(PIXELS)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """Return a PNG of 45 bytes whose header claims a size and which contains no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def pixels(image: Any) -> np.ndarray[Any, Any]:
    opened = open_image(image)
    assert opened.mode == "RGB"
    return np.asarray(opened)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "image.png").write_bytes(encoded(IMAGE))
    return tmp_path / "image.png"


def test_every_accepted_form_gives_the_same_pixels(path: Path) -> None:
    data = path.read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    for form in (IMAGE, Image.open(path), PIXELS, path, str(path), data, url, source_of(path), source_of(url)):
        assert np.array_equal(pixels(form), PIXELS), form
        source = source_of(form)
        assert isinstance(source, ImageSource)
        assert np.array_equal(np.asarray(source.open()), PIXELS), form


def test_equal_keys_mean_equal_images(path: Path) -> None:
    assert source_of(IMAGE).key() == source_of(PIXELS).key() != source_of(PIXELS[::-1].copy()).key()
    turned = PIXELS.reshape(3, 2, 3)  # the same bytes in another shape
    assert source_of(turned).key() != source_of(PIXELS).key()
    first = source_of(path).key()
    assert source_of(str(path)).key() == first
    path.write_bytes(encoded(IMAGE.rotate(180)))
    assert source_of(path).key() != first


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_keep_every_pixel(kind: str) -> None:
    assert np.array_equal(pixels(encoded(IMAGE, kind)), PIXELS)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "JPEG2000"])
def test_lossy_formats_are_read(kind: str) -> None:
    plain = Image.new("RGB", (16, 16), (200, 60, 30))
    assert np.abs(pixels(encoded(plain, kind)).astype(int) - (200, 60, 30)).max() <= 6


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [  # EXIF 2.32, tag 274: what the 0th row and the 0th column of the stored image are
        (1, PIXELS),
        (2, PIXELS[:, ::-1]),
        (3, PIXELS[::-1, ::-1]),
        (4, PIXELS[::-1]),
        (6, np.rot90(PIXELS, -1)),
        (8, np.rot90(PIXELS)),
    ],
)
def test_exif_orientation_is_undone(orientation: int, upright: np.ndarray[Any, Any]) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    assert np.array_equal(pixels(encoded(IMAGE, exif=exif)), upright)


def test_cmyk_becomes_rgb() -> None:
    ink = Image.new("CMYK", (4, 4), (0, 255, 255, 0))  # magenta and yellow: red
    assert np.abs(pixels(encoded(ink, "TIFF")).astype(int) - (255, 0, 0)).max() <= 2
    assert np.abs(pixels(encoded(ink.resize((16, 16)), "JPEG")).astype(int) - (255, 0, 0)).max() <= 6


def test_transparency_lies_on_white() -> None:
    rgba = Image.fromarray(np.array([[[0, 0, 0, 0], [0, 0, 0, 255], [255, 0, 0, 51]]], dtype=np.uint8))
    expected = [[[255, 255, 255], [0, 0, 0], [255, 204, 204]]]  # a fifth of red on white
    assert pixels(rgba).tolist() == pixels(encoded(rgba)).tolist() == expected
    assert pixels(np.asarray(rgba)).tolist() == expected


def test_palette_with_transparency_lies_on_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 0, 0, 200])
    palette.putdata([0, 1])
    assert pixels(encoded(palette, transparency=0)).tolist() == [[[255, 255, 255], [0, 0, 200]]]
    assert pixels(encoded(palette)).tolist() == [[[0, 0, 0], [0, 0, 200]]]


def test_greys_of_16_bits_are_scaled_by_the_format_not_by_the_image() -> None:
    dark = np.array([[0, 257, 25700, 65535]], dtype=np.uint16)
    grey = Image.fromarray(dark)
    assert grey.mode == "I;16"
    assert pixels(encoded(grey))[0, :, 0].tolist() == [0, 1, 100, 255]
    darker = Image.fromarray(np.array([[0, 200]], dtype=np.uint16))  # nearly black: stays so
    assert pixels(darker)[0, :, 0].tolist() == [0, 1]


def test_wide_greys_without_a_stated_white() -> None:
    assert pixels(Image.fromarray(np.array([[0, 128, 255]], dtype=np.int32)))[0, :, 0].tolist() == [0, 128, 255]
    assert pixels(Image.fromarray(np.array([[-5, 25700]], dtype=np.int32)))[0, :, 0].tolist() == [0, 100]
    assert pixels(Image.fromarray(np.array([[np.nan, 64.0]], dtype=np.float32)))[0, :, 0].tolist() == [0, 64]


def test_grey_and_one_bit_images() -> None:
    assert pixels(np.array([[0, 77]], dtype=np.uint8)).tolist() == [[[0] * 3, [77] * 3]]
    assert pixels(Image.new("1", (1, 1), 1)).tolist() == [[[255] * 3]]
    assert pixels(Image.new("LA", (1, 1), (77, 255))).tolist() == [[[77] * 3]]


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    assert pixels(data)[0, 0].tolist() == [255, 0, 0]


def test_one_pixel_is_an_image() -> None:
    assert pixels(encoded(Image.new("RGB", (1, 1), (1, 2, 3)))).tolist() == [[[1, 2, 3]]]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_truncated_file_is_named(tmp_path: Path, kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    whole = encoded(noise, kind)
    assert pixels(whole).shape == (40, 40, 3)
    half = tmp_path / f"half.{kind.lower()}"
    half.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MLLMError, match=f"half.{kind.lower()} is not a readable image"):
        open_image(half)


def test_files_that_are_not_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    (tmp_path / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    for name in ("notes.png", "empty.png", "page.eps"):
        with pytest.raises(MLLMError, match=rf"{name} is not a readable image. Expected one of PNG, JPEG"):
            open_image(tmp_path / name)
    for name in ("none.png", "", "https://example.org/cat.png", "a\0b", "/dev/zero"):
        with pytest.raises(MLLMError, match="There is no image file"):
            open_image(str(tmp_path / name) if not name.startswith(("/", "https")) else name)
    with pytest.raises(MLLMError, match=r"none\.png"):
        source_of(tmp_path / "none.png").key()


def test_pixel_bombs_are_refused_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def decoded(*_: Any) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    bomb = tmp_path / "bomb.png"
    for width, height in ((20_000, 20_000), (9_000, 9_000), (images.MAX_PIXELS + 1, 1)):
        bomb.write_bytes(png_header(width, height))
        assert bomb.stat().st_size < 100
        for form in (bomb, bomb.read_bytes()):
            with pytest.raises(MLLMError, match=rf"[Aa]t most {images.MAX_PIXELS}"):
                open_image(form)
    with pytest.raises(MLLMError, match="9000 x 9000 pixels"):
        open_image(Image.open(io.BytesIO(png_header(9_000, 9_000))))
    with pytest.raises(MLLMError, match="pixels were decoded"):  # a small enough image gets that far
        open_image(png_header(8_000, 8_000))


def test_too_many_bytes_are_not_read(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    data = path.read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    monkeypatch.setattr(images, "MAX_BYTES", len(data))
    for form in (path, data, url):
        open_image(form)
    monkeypatch.setattr(images, "MAX_BYTES", len(data) - 3)
    for form in (path, data, url):
        with pytest.raises(MLLMError, match="bytes"):
            open_image(form)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png,abc", "expected data:image/...;base64"),
        ("data:image/png;base64", "expected data:image/...;base64"),
        ("data:image/png;base64,@@@@", "not valid base64"),
        ("data:image/png;base64,aGVsbG8=", "the data URL is not a readable image"),
    ],
)
def test_wrong_data_urls(url: str, message: str) -> None:
    with pytest.raises(MLLMError, match=message):
        open_image(url)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), dtype=np.complex64),
        np.full((4, 4, 3), "a"),
        np.zeros((2, 4, 5), dtype=np.uint8),
        np.zeros((8, 4, 2), dtype=np.uint8),
        np.zeros((1, 4, 4, 3), dtype=np.uint8),  # a batch
        np.full((4, 4, 3), 256),
        np.full((4, 4, 3), -1),
        np.zeros((0, 4, 3), dtype=np.uint8),
        np.zeros(5, dtype=np.uint8),
    ],
)
def test_wrong_arrays_are_described(array: np.ndarray[Any, Any]) -> None:
    with pytest.raises(MLLMError) as caught:
        open_image(array)
    assert str(array.shape) in str(caught.value)


@pytest.mark.parametrize("value", [None, 3, ["a.png"], {"url": "a.png"}, object()])
def test_other_objects_are_named_by_their_type(value: Any) -> None:
    with pytest.raises(MLLMError, match=f"{type(value).__name__} is not an image"):
        open_image(value)


def test_image_that_pillow_opens_lazily_is_checked_too(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    half = io.BytesIO(encoded(noise)[:2000])
    with pytest.raises(MLLMError, match="the image is not a readable image"):
        open_image(Image.open(half))


def test_damaged_files_raise_only_our_error() -> None:
    random = np.random.default_rng(1)
    noise = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[274] = 6
    refused = 0
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        whole = encoded(noise, kind, exif=exif) if kind in ("PNG", "JPEG", "WEBP") else encoded(noise, kind)
        for _ in range(60):
            damaged = bytearray(whole[: random.integers(1, len(whole) + 1)])
            for position in random.integers(0, min(len(damaged), 80), 4):
                damaged[position] = random.integers(256)
            try:
                assert open_image(bytes(damaged)).mode == "RGB"
            except MLLMError:
                refused += 1
    assert refused > 100
