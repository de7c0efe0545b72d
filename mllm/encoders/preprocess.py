"""Pictures to pixels for models whose library has transforms of its own for torchvision: the same steps, by PIL."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def normalised(
    images: Sequence[Image.Image], side: int, mean: Sequence[float], std: Sequence[float], filter_: str
) -> Tensor:
    """Return pixels ``(B, 3, side, side)``: the whole picture, resized to the square.

    Args:
        images: RGB.
        side: in pixels.
        mean: of each channel.
        std: of each channel.
        filter_: ``bicubic``, ``bilinear``, ...; what resizes.
    """
    squares = [image.resize((side, side), Image.Resampling[filter_.upper()]) for image in images]
    values = torch.from_numpy(np.stack([np.asarray(square) for square in squares])).permute(0, 3, 1, 2)
    scale = [torch.tensor(list(numbers), device=values.device)[:, None, None] for numbers in (mean, std)]
    return (values / 255 - scale[0]) / scale[1]
