"""What a model answers: a list of parts, texts and images in the order in which they are to be shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class Text(str):
    """A stretch of text in an answer."""


@dataclass(frozen=True)
class ImagePart:
    """An image in an answer: found in an index, or made.

    Args:
        image: what can be opened (an `mllm.images.ImageSource`, or a PIL image that was made).
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
