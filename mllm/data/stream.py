"""The stream of examples that training reads: a function of the seed, the same on every process and when resumed.

Notable: what is drawn (which source, item, answer, partner) depends on the seed and the place in the stream alone, so
that passing over examples reads nothing.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from mllm.config.data import Data
from mllm.config.parts import PromptSpec
from mllm.data.items import SEPARATOR, Item, pieces_of
from mllm.data.lazy import Lazy
from mllm.data.sources import Source, check_combinable, check_learnable
from mllm.errors import MLLMError
from mllm.prompts.length import length_of, shortened
from mllm.prompts.pieces import Piece

TOGETHER = 4  # shards whose items are mixed: each is read from one end to the other, more or less
_SPARE = 20  # more shots are drawn than wanted, for some may be of the item's own picture


@dataclass(frozen=True)
class _Place:
    """One place of the stream: what is drawn there, nothing of it read."""

    number: int
    source: Source
    index: int


class Stream:
    """Training examples without end: sources by weight, each in a new order every epoch.

    Args:
        sources: what is drawn from.
        prompt: the words around it.
        seed: decides everything.
        lm: the language model; needed for its own chat template, and where lengths matter.
        num_visual: Q, the visual tokens of an image; needed where lengths matter.
        data: ``max_length``, ``truncate`` and ``group_by_length``.

    Raises:
        MLLMError: lengths matter, and there is no language model.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        prompt: PromptSpec,
        *,
        seed: int,
        lm: Any = None,
        num_visual: int = 0,
        data: Data | None = None,
    ) -> None:
        self._prompt, self._seed, self._lm, self._num_visual = prompt, seed, lm, num_visual
        self._data = data or Data()
        if lm is None and (self._data.max_length or self._data.group_by_length):
            raise MLLMError("data.max_length and group_by_length count tokens, and this stage has no language model.")
        self._places = _places(sources, seed)
        self._ready: list[_Place] = []  # drawn together and sorted by length, not handed out yet

    def take(self, size: int, *, rank: int = 0, world: int = 1) -> list[list[Piece]]:
        """Return the next batch, or of ``world`` processes the part of one; the others' parts are not read.

        An example that cannot be read, or is too long, comes as a picture that cannot be opened: what leaves unreadable
        pictures out leaves it out.
        """
        return [self._example(place) for place in self._batch(size)[rank::world]]

    def skip(self, batches: int, size: int) -> None:
        """Pass over batches of a size: nothing is read, but by ``group_by_length`` the texts around the new place."""
        together = self._data.group_by_length or 1
        whole, rest = divmod(batches, together)
        next(itertools.islice(self._places, whole * together * size, whole * together * size), None)
        for _ in range(rest):
            self._batch(size)

    def __iter__(self) -> Iterator[list[Piece]]:
        """Yield the examples one by one."""
        while True:
            yield from self.take(1)

    def _batch(self, size: int) -> list[_Place]:
        if not self._data.group_by_length:
            return list(itertools.islice(self._places, size))
        if not self._ready:
            self._ready = self._grouped(size, self._data.group_by_length)
        batch, self._ready = self._ready[:size], self._ready[size:]
        return batch

    def _grouped(self, size: int, together: int) -> list[_Place]:
        """Draw several batches and return them cut by length, in an order of their own."""
        drawn = list(itertools.islice(self._places, size * together))
        first = drawn[0].number
        drawn.sort(key=lambda place: (length_of(self._example(place), self._lm, self._num_visual), place.number))
        batches = [drawn[start : start + size] for start in range(0, len(drawn), size)]
        random.Random(f"{self._seed}/group/{first}").shuffle(batches)
        return [place for batch in batches for place in batch]

    def _example(self, place: _Place) -> list[Piece]:
        try:
            pieces = self._read(place)
            limit, cut = self._data.max_length, self._data.truncate == "text"
            return pieces if limit is None else shortened(pieces, limit, self._lm, self._num_visual, cut=cut)
        except MLLMError as error:
            return [Unreadable(f"{place.source.spec.format}, item {place.index}: {error}")]

    def _read(self, place: _Place) -> list[Piece]:
        """Return an example as it stands; of several answers one is drawn each time it comes up."""
        draw = random.Random(f"{self._seed}/{place.number}")
        spec, items = place.source.spec, place.source.items
        item = items[place.index]
        check_combinable(item, spec)
        shown = [item]
        if spec.shots:
            shown = [replace(item, shots=(*_shots(place, item, draw), *item.shots))]
        elif spec.concatenate and draw.random() < spec.concatenate:
            other = draw.randrange(len(items) - 1)
            shown = [items[other + (other >= place.index)], item]
        pieces: list[Piece] = []
        for one in shown:
            check_learnable(one)
            check_combinable(one, spec)
            answer = draw.choice(one.answers) if one.answers else None
            pieces += [*([SEPARATOR] if pieces else []), *pieces_of(one, self._prompt, answer, self._lm)]
        return pieces


@dataclass(frozen=True)
class Unreadable:
    """Stands for an example that cannot be read: a picture that says why when it is opened."""

    reason: str

    def open(self) -> Image.Image:
        """Raise an `MLLMError` with the reason."""
        raise MLLMError(self.reason)

    def key(self) -> str:
        """Raise an `MLLMError` with the reason."""
        raise MLLMError(self.reason)


def _places(sources: Sequence[Source], seed: int) -> Iterator[_Place]:
    draw = random.Random(f"{seed}/mixture")
    orders = [_shuffled(source.items, f"{seed}/{number}") for number, source in enumerate(sources)]
    weights = [source.spec.weight for source in sources]
    for number in itertools.count():
        which = 0 if len(sources) == 1 else draw.choices(range(len(sources)), weights)[0]
        yield _Place(number, sources[which], next(orders[which]))


def _shuffled(items: Sequence[Item], seed: str) -> Iterator[int]:
    """Yield the places of items in a new order every epoch; of items in shards, a few shards at a time."""
    shards = items.shards if isinstance(items, Lazy) else [range(len(items))]
    for epoch in itertools.count():
        draw = random.Random(f"{seed}/{epoch}")
        if len(shards) > 1:
            shards = draw.sample(shards, len(shards))
        for start in range(0, len(shards), TOGETHER):
            order = list(itertools.chain(*shards[start : start + TOGETHER]))
            draw.shuffle(order)
            yield from order


def _shots(place: _Place, item: Item, draw: random.Random) -> tuple[Item, ...]:
    """Return solved examples of the item's source, none of its own picture."""
    items, wanted = place.source.items, place.source.spec.shots
    found: list[Item] = []
    for index in draw.sample(range(len(items)), min(len(items), wanted + _SPARE)):
        other = items[index] if index != place.index else item
        if len(found) < wanted and other.answers and other is not item and not {*item.images} & {*other.images}:
            found.append(other)
    if len(found) < wanted:
        raise MLLMError(f"{wanted} shots are wanted, and {len(found)} can be had that show another picture.")
    return tuple(found)
