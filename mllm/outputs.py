"""What a model answers: a list of parts, texts and images in the order in which they are to be shown."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm.media.images import ImageFile, open_image


class Text(str):
    """A stretch of text in an answer."""


@dataclass(frozen=True)
class ImagePart:
    """An image in an answer: found in an index, or made.

    Args:
        image: what can be opened (an `mllm.media.images.ImageSource`, or a PIL image that was made).
        id: of a found one in its index.
        score: how close it is to what was meant, a cosine; None: not known.
        source: the path of a found one; of a made one, what made it.
        seed: of a made one.
        candidates: the next best ones, the closest first.
    """

    image: Any
    id: str | None = None
    score: float | None = None
    source: str = ""
    seed: int | None = None
    candidates: tuple[ImagePart, ...] = ()


class Output(list[Text | ImagePart]):
    """An answer: a list of parts; ``str(output)`` is its text."""

    def __str__(self) -> str:
        return "".join(part for part in self if isinstance(part, Text))

    @property
    def images(self) -> list[ImagePart]:
        """Return the images, in order."""
        return [part for part in self if isinstance(part, ImagePart)]


def with_files(output: Output, folder: Path) -> str:
    """Return an answer's text with the file of each image in its place, such as ``[photos/1.png]``.

    An image that is no file yet is saved to the folder, under the next free number.
    """
    return "".join(part if isinstance(part, Text) else f"[{_file(part, folder)}]" for part in output)


def data_url(part: ImagePart, side: int = 512) -> str:
    """Return an image as a data URL of a JPEG, its longer side at most so many pixels."""
    image = open_image(part.image).convert("RGB")
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _file(part: ImagePart, folder: Path) -> Path:
    if isinstance(part.image, ImageFile):
        return part.image.path
    folder.mkdir(parents=True, exist_ok=True)
    taken = [int(path.stem) for path in folder.glob("*.png") if path.stem.isdecimal()]
    place = folder / f"{max(taken, default=0) + 1}.png"
    open_image(part.image).save(place)
    return place
