"""Read `mllm/easy-vqa`: 48,248 questions about 5,000 synthetic images, 64 x 64, of one coloured shape each."""

from __future__ import annotations

import json

from mllm.data.items import Item
from mllm.errors import MLLMError, near
from mllm.hub.embedded import locate
from mllm.media.images import ImageFile

SPLITS = ("train", "test")  # as the package defines them
SHAPES = ("circle", "rectangle", "triangle")


def easy_vqa(*, split: str, size: int | None = None) -> list[Item]:
    """Return the questions of a split in the package's order; the kind is "shape", "colour" or "yes/no".

    Args:
        split: "train" (38,575 questions, 4,000 images) or "test" (9,673 and 1,000).
        size: the most items; None: all.

    Raises:
        MLLMError: an unknown split, a negative size, or the part is not installed.
    """
    if split not in SPLITS:
        raise MLLMError(f"easy-vqa has no split {split!r}. {near(split, SPLITS)}")
    if size is not None and size < 0:
        raise MLLMError(f"easy-vqa cannot have size {size}: expected 0 or more. Leave out size to get all items.")
    folder = locate("mllm/easy-vqa") / "data" / split
    rows = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    images = {number: ImageFile(folder / "images" / f"{number}.png") for _, _, number in rows}
    return [
        Item(f"easy-vqa/{split}/{index}", (images[number],), (answer,), question, _kind(answer))
        for index, (question, answer, number) in enumerate(rows[:size])
    ]


def _kind(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in SHAPES else "colour"
