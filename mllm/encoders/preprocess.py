"""Make images square, and preprocess them with PIL as torchvision transforms would; normalize them on any device.

An encoder takes a square. An image becomes one as `encoder.resize` says: it is stretched, cropped or padded, with the
same pixels as the PIL-based image processors of `transformers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Resize = Literal["stretch", "crop", "pad"]
ELONGATED = 100  # the longest aspect ratio of which the whole image is resized before it is cropped or padded
MAX_PADDED = 8000  # pixels; a larger image is reduced before it is padded


class Normalization:
    """Normalize pixels by a table: on any device, and with the very numbers of an image processor.

    Args:
        table: what each channel's values from 0 to 255 become ``(3, 256)``.
    """

    def __init__(self, table: Tensor) -> None:
        self._table = table

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return pixels ``(B, 3, H, W)`` that are bytes in the table's type; others are returned unchanged."""
        if pixels.dtype != torch.uint8:
            return pixels
        if self._table.device != pixels.device:
            self._table = self._table.to(pixels.device)
        places = pixels.int() + 256 * torch.arange(3, dtype=torch.int, device=pixels.device)[:, None, None]
        return self._table.flatten().index_select(0, places.flatten()).view(pixels.shape)


def normalization_of(process: Callable[[Image.Image], Any], side: int) -> Normalization | None:
    """Return an image processor's normalization, measured; None: a pixel does not depend on its value alone.

    Args:
        process: returns the pixels ``(1, 3, side, side)`` of a square image.
        side: of the images.
    """
    draw = np.random.default_rng(0)
    values = np.resize(np.arange(256, dtype=np.uint8), side * side)
    gray = process(Image.fromarray(np.repeat(values.reshape(side, side, 1), 3, axis=2)))
    color = Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8))
    expected = process(color)
    if side * side < 256 or not all(_is_image(pixels, side) for pixels in (gray, expected)):
        return None
    normalization = Normalization(gray[0].flatten(1)[:, :256].clone())
    return normalization if torch.equal(normalization(as_bytes([color])), expected) else None


def _is_image(pixels: Any, side: int) -> bool:
    return isinstance(pixels, Tensor) and pixels.shape == (1, 3, side, side)


def as_bytes(images: Sequence[Image.Image]) -> Tensor:
    """Return the pixels ``(B, 3, H, W)`` of RGB images of one size, as bytes."""
    arrays = [np.array(image) for image in images]
    return torch.from_numpy(np.stack(arrays) if len(arrays) > 1 else arrays[0][None]).permute(0, 3, 1, 2)


def square(
    image: Image.Image, side: int, resize: Resize, resample: int | None, fill: Sequence[float] = (0, 0, 0)
) -> Image.Image:
    """Return an RGB image as a square.

    Args:
        image: an RGB image.
        side: the side of the square in pixels.
        resize: ``stretch`` the whole image; ``crop``: resize the shorter side, and crop the center; ``pad``: extend the
            shorter side with ``fill``, and resize.
        resample: the resampling filter of PIL; None: PIL's default.
        fill: the mean color of the model's images, each channel from 0 to 1.
    """
    if resize == "crop":
        return _cropped(bounded(image), side, resample)
    if resize == "pad":
        image = _padded(bounded(image), tuple(int(channel * 255) for channel in fill))
    return image.resize((side, side), resample)


def bounded(image: Image.Image) -> Image.Image:
    """Return the center of an image that is so elongated that resizing or padding it would take too much memory."""
    longest = ELONGATED * min(image.size)
    return _center(image, min(image.width, longest), min(image.height, longest))


def _cropped(image: Image.Image, side: int, resample: int | None) -> Image.Image:
    shorter = min(image.size)
    size = int(side * image.width / shorter), int(side * image.height / shorter)
    return _center(image.resize(size, resample), side, side)


def _padded(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """Return an image in the middle of a square (LLaVA-1.5, arXiv:2310.03744)."""
    side = max(image.size)
    if side > MAX_PADDED:
        image = image.resize([max(1, round(length * MAX_PADDED / side)) for length in image.size])
        side = MAX_PADDED
    if image.width == image.height:
        return image
    padded = Image.new("RGB", (side, side), color)
    padded.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return padded


def _center(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.size == (width, height):
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def normalized_pixels(
    images: Sequence[Image.Image],
    side: int,
    resize: Resize,
    mean: Sequence[float],
    std: Sequence[float],
    filter_: str,
) -> Tensor:
    """Return normalized pixels ``(B, 3, side, side)`` of images that are made square.

    Args:
        images: RGB images.
        side: the side of the square in pixels.
        resize: see `square`.
        mean: the mean of each channel.
        std: the standard deviation of each channel.
        filter_: the resampling filter: ``bicubic``, ``bilinear``, ...
    """
    resample = Image.Resampling[filter_.upper()]
    squares = [square(image, side, resize, resample, mean) for image in images]
    values = as_bytes(squares)
    scale = [torch.tensor(list(numbers), device=values.device)[:, None, None] for numbers in (mean, std)]
    return (values / 255 - scale[0]) / scale[1]
