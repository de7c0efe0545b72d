"""Answer by the choice that a scorer embeds closest to the image (``answer: closest``): zero-shot classification."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from mllm.eval.answers.base import Context
from mllm.eval.answers.choices import chosen
from mllm.eval.scoring import MODEL

from mllm.assembly import Assembly
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.media.images import ImageSource
from mllm.slots import Scorer


class Closest:
    """Choose by the scorer's cosine similarities, as dual encoders do; the language model is not asked."""

    def baselines(self, items: Sequence[Item]) -> dict[str, bool]:
        """Return none: without the image a scorer has nothing to compare."""
        return {}

    def answers(self, model: Assembly, items: Sequence[Item], context: Context) -> dict[str, list[str]]:
        """Return the chosen texts."""
        return {MODEL: closest(items, context.helpers.scorer, context.suite.calibrate)}

    def shown_images(self, item: Item, answer: str) -> tuple[ImageSource, ...]:
        """Return the item's image."""
        return item.images


def closest(items: Sequence[Item], scorer: Scorer, calibrate: float) -> list[str]:
    """Return each item's choice of the highest cosine similarity to its image.

    Args:
        items: each with one image and choices.
        scorer: embeds images and texts.
        calibrate: the share of a choice's mean cosine over all items that is subtracted, as in `choices.chosen`.

    Raises:
        MLLMError: an item without choices, or with more or fewer images than one.
    """
    for item in items:
        if not item.choices or len(item.images) != 1:
            raise MLLMError(f"Item {item.id!r}: answer=closest needs one image and choices; take a suite that chooses.")
    images = list(dict.fromkeys(item.images[0] for item in items))
    texts = list(dict.fromkeys(chain.from_iterable(dict.fromkeys(item.choices for item in items))))
    cosines = scorer.image_text(images, texts).tolist()
    rows = {image: dict(zip(texts, row, strict=True)) for image, row in zip(images, cosines, strict=True)}
    return chosen([{text: rows[item.images[0]][text] for text in item.choices} for item in items], calibrate)
