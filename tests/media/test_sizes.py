"""Sizes of images from their headers: those of the opened images, and no pixel of a PNG is decoded for them."""

from __future__ import annotations

import io

import pytest
from PIL import Image, ImageFile

from mllm.media.images import ImageBytes, open_image
from mllm.media.sizes import size_of
from mllm.testing import tiny_image

ORIENTATION = 0x0112


def png(*, orientation: int | None, behind: bool = False) -> bytes:
    """Return a PNG of 30 x 20 pixels; ``behind``: its Exif stands after the pixels."""
    exif = Image.Exif()
    if orientation is not None:
        exif[ORIENTATION] = orientation
    file = io.BytesIO()
    tiny_image(1, size=(30, 20)).save(file, "PNG", **({} if orientation is None else {"exif": exif}))
    data = file.getvalue()
    if behind:
        start = data.index(b"eXIf") - 4
        stop = start + 12 + int.from_bytes(data[start : start + 4])
        end = data.index(b"IEND") - 4
        data = data[:start] + data[stop:end] + data[start:stop] + data[end:]
    return data


@pytest.mark.parametrize(("orientation", "size"), [(None, (30, 20)), (3, (30, 20)), (6, (20, 30))])
def test_no_pixel_of_a_png_is_decoded(orientation, size, monkeypatch):
    source = ImageBytes(png(orientation=orientation), "a.png")
    assert source.open().size == size
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("it was decoded"))
    assert size_of(source) == size


@pytest.mark.parametrize(("orientation", "size"), [(3, (30, 20)), (8, (20, 30))])
def test_exif_behind_the_pixels_counts_as_it_does_when_the_image_is_opened(orientation, size):
    data = png(orientation=orientation, behind=True)
    assert data.index(b"eXIf") > data.rindex(b"IDAT")
    assert size_of(ImageBytes(data, "a.png")) == open_image(data).size == size
    with Image.open(io.BytesIO(data)) as image:
        assert size_of(image) == size
