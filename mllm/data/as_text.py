"""Put items' captions in the place of their images (``see: text``), so that training needs no image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.media.texts import TextSource


def as_text(item: Item, caption: str | None = None) -> Item:
    """Return an item with a caption in its images' place; None: its first.

    Raises:
        MLLMError: it has no caption: it is a question, a conversation or a document, or has no answer.
    """
    captions = [answer for answer in item.answers if answer.strip()]
    if item.question is not None or not captions:
        raise MLLMError(
            f"data: the item {item.id!r} has no caption, and with see: text an item's caption stands in its image's "
            "place. Give a source of captions, or leave out 'see: text' for this one."
        )
    return replace(item, images=(TextSource(caption or captions[0]),), shots=tuple(map(as_text, item.shots)))


def for_each_caption(item: Item) -> list[Item]:
    """Return an item for each caption of one, with that caption alone, in its images' place.

    Raises:
        MLLMError: it has no caption.
    """
    captions = [answer for answer in item.answers if answer.strip()]
    if len(captions) < 2:
        return [as_text(item)]
    parts = [replace(item, id=f"{item.id}/{number}", answers=(each,)) for number, each in enumerate(captions)]
    return [as_text(part) for part in parts]


def in_texts(items: Sequence[Item]) -> list[Item]:
    """Return an item for each caption of all items."""
    return [part for item in items for part in for_each_caption(item)]
