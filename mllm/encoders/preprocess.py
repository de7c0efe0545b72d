"""Preprocess images with PIL for models whose libraries use torchvision transforms (timm, open_clip)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def normalized_pixels(
    images: Sequence[Image.Image], side: int, mean: Sequence[float], std: Sequence[float], filter_: str
) -> Tensor:
    """Return normalized pixels ``(B, 3, side, side)`` of whole images, resized to a square without cropping.

    Args:
        images: RGB images.
        side: the side of the square in pixels.
        mean: the mean of each channel.
        std: the standard deviation of each channel.
        filter_: the resampling filter: ``bicubic``, ``bilinear``, ...
    """
    squares = [image.resize((side, side), Image.Resampling[filter_.upper()]) for image in images]
    values = torch.from_numpy(np.stack([np.asarray(square) for square in squares])).permute(0, 3, 1, 2)
    scale = [torch.tensor(list(numbers), device=values.device)[:, None, None] for numbers in (mean, std)]
    return (values / 255 - scale[0]) / scale[1]
