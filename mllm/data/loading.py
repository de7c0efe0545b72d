"""From a recipe's data to the stream of examples that training reads, the same in every run with one seed."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from mllm.data.items import Item, pieces_of
from mllm.errors import MLLMError
from mllm.prompt import Piece
from mllm.registry import lookup
from mllm.spec import DataSpec, PromptSpec


def reader(spec: DataSpec) -> Callable[[], list[Item]]:
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


def read(spec: DataSpec) -> list[Item]:
    """Return the items of one source.

    Raises:
        MLLMError: an unknown reader or argument, no items, or what the reader finds wrong.
    """
    items = reader(spec)()
    if not items:
        raise MLLMError(f"data: the reader {spec.format!r} found no items with {spec.options()}.")
    return items


def read_all(specs: Sequence[DataSpec]) -> list[tuple[float, list[Item]]]:
    """Return (weight, items) of every source that is trained on; empty where there is none.

    Raises:
        MLLMError: an item has no answer to learn, or what a reader finds wrong.
    """
    sources = [(spec.weight, read(spec)) for spec in specs]
    for _, items in sources:
        for item in items:
            if not item.answers and not item.messages:
                raise MLLMError(
                    f"data: the item {item.id!r} has no answer, and training needs one: is it a test split?"
                )
    return sources


def examples(
    sources: Sequence[tuple[float, list[Item]]], prompt: PromptSpec, *, seed: int, lm: Any = None
) -> Iterator[list[Piece]]:
    """Yield training examples without end: sources by weight, each in a new order every epoch.

    Of an item's several answers one is drawn each time it comes up. ``lm`` is needed for conversations in the language
    model's own chat template.
    """
    draw = random.Random(f"{seed}/mixture")
    streams = [_shuffled(items, f"{seed}/{index}") for index, (_, items) in enumerate(sources)]
    weights = [weight for weight, _ in sources]
    while True:
        stream = streams[0] if len(streams) == 1 else draw.choices(streams, weights)[0]
        item = next(stream)
        yield pieces_of(item, prompt, draw.choice(item.answers) if item.answers else None, lm)


def _shuffled(items: Sequence[Item], seed: str) -> Iterator[Item]:
    epoch = 0
    while True:
        order = list(range(len(items)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        yield from (items[index] for index in order)
        epoch += 1
