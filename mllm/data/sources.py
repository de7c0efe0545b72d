"""From a recipe's data to sources of items, and what tells them from others."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mllm.config.data import DataSpec
from mllm.data.items import Item
from mllm.data.lazy import Lazy
from mllm.errors import MLLMError
from mllm.media.images import Black, ImageFile, ImageSource
from mllm.registry import lookup

FEW = 2000  # pictures of a source, up to which their content is hashed


@dataclass(frozen=True)
class Source:
    """The items of one entry of a recipe's data; ``items`` may be read one by one, when they are needed."""

    spec: DataSpec
    items: Sequence[Item]


def reader(spec: DataSpec) -> Callable[[], Sequence[Item]]:
    """Return the reader of one source with its arguments, not called yet.

    Raises:
        MLLMError: an unknown reader, or arguments that it does not take.
    """
    found = lookup("readers", spec.format)
    signature = inspect.signature(found)
    try:
        signature.bind(**spec.options())
    except TypeError as error:
        raise MLLMError(
            f"data: the reader {spec.format!r} does not take these arguments: {error}. "
            f"It takes: {', '.join(signature.parameters)}."
        ) from None
    return partial(found, **spec.options())


def read(spec: DataSpec, *, seed: int = 0) -> Sequence[Item]:
    """Return the items of one source; of a ``fraction``, the same ones for one seed, and of a smaller one some of them.

    Raises:
        MLLMError: an unknown reader or argument, no items, or what the reader finds wrong.
    """
    items = reader(spec)()
    if not items:
        raise MLLMError(f"data: the reader {spec.format!r} found no items with {spec.options()}.")
    if spec.blank:
        items = _blank(items)
    if spec.fraction == 1:
        return items
    order = list(range(len(items)))
    random.Random(f"{seed}/fraction").shuffle(order)
    places = sorted(order[: math.ceil(spec.fraction * len(items))])
    return items.part(places) if isinstance(items, Lazy) else [items[place] for place in places]


def _blank(items: Sequence[Item]) -> Sequence[Item]:
    """Return items whose pictures are black."""

    def made(item: Item) -> Item:
        if item.messages or item.document:
            raise MLLMError(f"data: the item {item.id!r} is a conversation or a document; 'blank' is for captions.")
        shots = tuple(made(shot) for shot in item.shots)
        return replace(item, images=tuple(Black() for _ in item.images), shots=shots)

    if not isinstance(items, Lazy):
        return [made(item) for item in items]
    return Lazy(
        len(items),
        lambda place: made(items[place]),
        fingerprint=lambda: f"{items.fingerprint()} black",
        shards=items.shards,
    )


def read_all(specs: Sequence[DataSpec], *, seed: int = 0) -> list[Source]:
    """Return every source that is trained on; none where there is none.

    Raises:
        MLLMError: an item has no answer to learn, a source is too small or of the wrong kind for what is asked of it,
            or what a reader finds wrong.
    """
    sources = [Source(spec, read(spec, seed=seed)) for spec in specs]
    for source in sources:
        for item in () if isinstance(source.items, Lazy) else source.items:  # those are found out when they are read
            check_learnable(item)
            check_combinable(item, source.spec)
        needed = max(source.spec.shots, 1 if source.spec.concatenate else 0) + 1
        if len(source.items) < needed:
            raise MLLMError(
                f"data: {source.spec.format} has {len(source.items)} items; shots and concatenate need {needed}."
            )
    return sources


def check_learnable(item: Item) -> None:
    """Raise an `MLLMError` for an item that teaches nothing."""
    if not (item.answers or item.messages or any(isinstance(piece, str) for piece in item.document)):
        raise MLLMError(f"data: the item {item.id!r} has no answer, and training needs one: is it a test split?")


def check_combinable(item: Item, spec: DataSpec) -> None:
    """Raise an `MLLMError` for a conversation or a document of a source whose items are put together."""
    if (spec.shots or spec.concatenate) and not item.answers:
        raise MLLMError(
            f"data: the item {item.id!r} is a conversation or a document; shots and concatenate are for captions and "
            "questions. Take them out of this source."
        )


def fingerprint(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """Return what tells the data of a run from other data: for each source its size and a hash.

    The hash is over the ids, all texts and the order, and over the pictures: their content where a source has at most
    2,000, else their names and sizes in bytes, so that a large set is not read. Items that are read one by one are told
    by their files' index. Where the files are, and when they were written, changes nothing.
    """
    return [
        {
            "format": source.spec.format,
            "items": len(source.items),
            "sha256": source.items.fingerprint() if isinstance(source.items, Lazy) else _hash(source.items),
        }
        for source in sources
    ]


def _hash(items: Sequence[Item]) -> str:
    pictures = {picture for item in items for picture in item.images}
    known = {picture: _picture(picture, content=len(pictures) <= FEW) for picture in pictures}
    whole = hashlib.sha256()
    for item in items:
        row = [item.id, item.question, item.answers, item.messages, item.document, [s.id for s in item.shots]]
        told = [known[picture] for picture in item.images]
        whole.update(json.dumps([*row, told], default=lambda value: None).encode())  # a picture among texts: its place
    return whole.hexdigest()


def _picture(picture: ImageSource, *, content: bool) -> str:
    """Return a picture's content, or its name and size; what is unreadable is so everywhere."""
    try:
        if content or not isinstance(picture, ImageFile):
            return picture.key()
        return f"{picture.path.name} {picture.path.stat().st_size}"
    except (MLLMError, OSError):
        return "unreadable"
