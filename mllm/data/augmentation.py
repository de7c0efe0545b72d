"""Change training images at random: crops and reflections, which depend on a seed alone.

An image's seed is made from the stage's seed and its position in the stream, so that a run repeats them bit for bit,
resumed or not, for any number of processes.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageOps

from mllm.config.data import AugmentSpec
from mllm.media.images import ImageSource
from mllm.prompts.pieces import Piece, is_image

Box = tuple[int, int, int, int]  # left, top, right, bottom

ASPECT = (3 / 4, 4 / 3)  # of a crop
TRIES = 10  # for a crop that fits into the image


@dataclass(frozen=True)
class Augmented:
    """An image of which a random crop is taken, and which may be mirrored.

    Args:
        image: the source of the whole image.
        seed: of the random choices.
        crop: the smallest and the largest share of the area; None: the whole image.
        flip: how often it is mirrored, left to right.
    """

    image: ImageSource
    seed: str
    crop: tuple[float, float] | None
    flip: float

    def open(self) -> Image.Image:
        """Return the image, RGB."""
        generator = random.Random(self.seed)
        image = self.image.open()
        if self.crop is not None:
            image = image.crop(random_box(image.size, self.crop, generator))
        return ImageOps.mirror(image) if generator.random() < self.flip else image

    def key(self) -> str:
        """Return a hash of the image's content and of what changes it."""
        return hashlib.sha256(f"{self.image.key()} {self.crop} {self.flip} {self.seed}".encode()).hexdigest()


def augmented(pieces: Sequence[Piece], spec: AugmentSpec, seed: str) -> list[Piece]:
    """Return an example whose images are changed at random, each with a seed of its own."""
    return [
        Augmented(piece, f"{seed}/{index}", spec.crop, spec.flip) if is_image(piece) else piece
        for index, piece in enumerate(pieces)
    ]


def random_box(size: tuple[int, int], area: tuple[float, float], generator: random.Random) -> Box:
    """Return a random rectangle of an image, as torchvision's ``RandomResizedCrop`` draws it.

    Its area is uniform, and the logarithm of its aspect ratio. If none fits, it is the largest centered one whose
    aspect ratio is allowed.

    Args:
        size: width and height.
        area: the smallest and the largest share of the area.
        generator: draws it.
    """
    width, height = size
    for _ in range(TRIES):
        target = width * height * generator.uniform(*area)
        aspect = math.exp(generator.uniform(*map(math.log, ASPECT)))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = generator.randint(0, width - w), generator.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, max(1, round(height * ASPECT[1]))), min(height, max(1, round(width / ASPECT[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
