"""From a recipe's data to the stream of examples that training reads, the same in every run with one seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from mllm.data.items import Item, pieces_of
from mllm.errors import MLLMError
from mllm.prompt import Piece
from mllm.recipe import DataSpec, PromptSpec
from mllm.registry import lookup


def read(spec: DataSpec) -> list[Item]:
    """Return the items of one source.

    Raises:
        MLLMError: an unknown reader or argument, or what the reader finds wrong.
    """
    reader = lookup("readers", spec.format)
    try:
        items: list[Item] = reader(**spec.options())
    except TypeError as error:
        raise MLLMError(f"data: the reader {spec.format!r} does not take these arguments: {error}.") from None
    return items


def read_all(data: DataSpec | list[DataSpec] | None) -> list[tuple[float, list[Item]]]:
    """Return (weight, items) of every source; empty where there is none."""
    specs = [] if data is None else data if isinstance(data, list) else [data]
    return [(spec.weight, read(spec)) for spec in specs]


def examples(
    sources: Sequence[tuple[float, list[Item]]], prompt: PromptSpec, *, seed: int
) -> Iterator[list[Piece]]:
    """Yield training examples without end: sources by weight, each in a new order every epoch.

    Of an item's several answers one is drawn each time it comes up.
    """
    draw = random.Random(f"{seed}/mixture")
    streams = [_shuffled(items, f"{seed}/{index}") for index, (_, items) in enumerate(sources)]
    weights = [weight for weight, _ in sources]
    while True:
        stream = streams[0] if len(streams) == 1 else draw.choices(streams, weights)[0]
        item = next(stream)
        yield pieces_of(item, prompt, draw.choice(item.answers))


def _shuffled(items: Sequence[Item], seed: str) -> Iterator[Item]:
    epoch = 0
    while True:
        order = list(range(len(items)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        yield from (items[index] for index in order)
        epoch += 1
