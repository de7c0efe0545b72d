"""Hash the ids, texts and images of items, to recognise the data of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from mllm.data.items import Item
from mllm.data.notes import sizes_of
from mllm.errors import MLLMError
from mllm.media.images import ImageFile, ImageSource

HASH_LIMIT = 2000  # sources with at most this many images have their images' content hashed


def hash_of(items: Sequence[Item]) -> str:
    """Return a hash of items: of the images' content, or of their names and sizes if they are many."""
    images = list(dict.fromkeys(image for item in items for image in item.images))
    named = len(images) > HASH_LIMIT
    files = {image: str(image.path) for image in images if named and isinstance(image, ImageFile)}
    sizes = dict(zip(files.values(), sizes_of(list(files.values())), strict=True))
    labels = {image: _label(image, sizes[files[image]]) if image in files else _content(image) for image in images}
    digest = hashlib.sha256()
    for item in items:
        row = [item.id, item.question, item.answers, item.messages, item.document, [s.id for s in item.shots]]
        shown = [labels[image] for image in item.images]
        digest.update(json.dumps([*row, shown], default=lambda value: None).encode())  # None for an image among texts
    return digest.hexdigest()


def _label(image: ImageFile, size: int | None) -> str:
    return "unreadable" if size is None else f"{image.path.name} {size}"


def _content(image: ImageSource) -> str:
    """Return a hash of an image's content; the same for every unreadable image."""
    try:
        return image.key()
    except (MLLMError, OSError):
        return "unreadable"
