"""Represent a model's answer: a list of texts and images, in display order."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mllm.errors import MLLMError
from mllm.media.images import ImageFile, open_image
from mllm.system import write


class Text(str):
    """A span of text in an answer."""


@dataclass(frozen=True)
class ImagePart:
    """An image in an answer: retrieved from an index, or generated.

    Args:
        image: an `mllm.media.images.ImageSource` (retrieved), or a PIL image (generated).
        id: the index entry of a retrieved image.
        score: the cosine between the image and the model's state; None: unknown.
        source: the path of a retrieved image; the name of the decoder that generated it.
        seed: the seed of a generated image.
        candidates: the next best images, the closest first.
    """

    image: Any
    id: str | None = None
    score: float | None = None
    source: str = ""
    seed: int | None = None
    candidates: tuple[ImagePart, ...] = ()


class Output(list[Text | ImagePart]):
    """An answer: a list of parts; ``str(output)`` is its text.

    Args:
        parts: texts and images, in display order.
        finish_reason: why the answer ended: ``stop``, the model or a stop string ended it; ``length``, it has as many
            tokens as it may have, ``max_new_tokens`` or what fits into the context.
        num_tokens: of the answer.
    """

    def __init__(
        self,
        parts: Iterable[Text | ImagePart] = (),
        finish_reason: Literal["stop", "length"] = "stop",
        num_tokens: int = 0,
    ) -> None:
        super().__init__(parts)
        self.finish_reason, self.num_tokens = finish_reason, num_tokens

    def __str__(self) -> str:
        return "".join(part for part in self if isinstance(part, Text))

    @property
    def images(self) -> list[ImagePart]:
        """Return the images, in order."""
        return [part for part in self if isinstance(part, ImagePart)]


def with_files(output: Output, folder: Path) -> str:
    """Return an answer's text, with the file of each image in brackets, such as ``[photos/1.png]``.

    A generated image is saved to the folder first, under the next free number.
    """
    return "".join(part if isinstance(part, Text) else f"[{_file(part, folder)}]" for part in output)


def data_url(part: ImagePart, side: int = 512) -> str:
    """Return an image as a JPEG data URL, scaled down to ``side`` pixels on its longer side."""
    image = open_image(part.image).convert("RGB")
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _file(part: ImagePart, folder: Path) -> Path:
    if isinstance(part.image, ImageFile):
        return part.image.path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        numbers = [int(path.stem) for path in folder.glob("*.png") if path.stem.isdecimal()]
        file = folder / f"{max(numbers, default=0) + 1}.png"
        write(file, lambda partial: open_image(part.image).save(partial, "PNG"))
    except OSError as error:
        raise MLLMError(
            f"The image cannot be saved in {str(folder)[:200]}: {error.strerror or error}. Give another folder."
        ) from None
    return file
