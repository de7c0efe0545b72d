"""Stream training examples in an order that the seed determines, the same on every process and after resuming.

The random choices (source, item, answer, shots) depend only on the seed and the position in the stream, so that
skipping examples reads nothing.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from mllm.config.data import Data
from mllm.config.prompt import PromptSpec
from mllm.data.as_text import as_text
from mllm.data.augmentation import augmented
from mllm.data.items import Item, pieces_of
from mllm.data.lazy import Lazy
from mllm.data.sources import Source, check_combinable, check_learnable
from mllm.errors import MLLMError
from mllm.prompts.entities import behind_last_image, of_caption
from mllm.prompts.formatting import SEPARATOR
from mllm.prompts.length import length_of, shortened, with_short_answers
from mllm.prompts.pieces import Counts, Piece

MIXED_SHARDS = 4  # shards whose items are shuffled together, so that each is read almost sequentially
_SPARE = 20  # additional candidates for shots, since some may show the item's image


@dataclass(frozen=True)
class _Position:
    """A position in the stream: the item sampled there, which is not read yet."""

    number: int
    source: Source
    index: int


class Stream:
    """An endless stream of training examples: sources sampled by weight, each in a new order every epoch.

    Args:
        sources: the sources to sample from.
        prompt: the prompt format.
        seed: determines the stream.
        lm: the language model; needed for its chat template, and if ``data`` limits or groups by length.
        num_visual: the visual tokens of an image (`mllm.prompts.pieces.Counts`); needed if ``data`` limits or groups by
            length.
        data: ``max_length``, ``truncate``, ``answer_length``, ``group_by_length`` and ``augment``.

    Raises:
        MLLMError: ``data`` limits or groups by length, and there is no language model.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        prompt: PromptSpec,
        *,
        seed: int,
        lm: Any = None,
        num_visual: Counts = 0,
        data: Data | None = None,
    ) -> None:
        self._prompt, self._seed, self._lm, self._num_visual = prompt, seed, lm, num_visual
        self._data = data or Data()
        if lm is None and (self._data.max_length or self._data.answer_length or self._data.group_by_length):
            raise MLLMError(
                "data.max_length, answer_length and group_by_length count tokens, but this stage has no language "
                "model. Leave them out."
            )
        self._positions = _positions(sources, seed)
        self._ready: list[_Position] = []  # sampled together and sorted by length, not returned yet

    def take(self, size: int, *, rank: int = 0, world: int = 1) -> list[list[Piece]]:
        """Return the next batch, or the part of process ``rank`` of ``world``; the other parts are not read.

        An example that cannot be read, or is too long, is returned as an `Unreadable`, so that it is skipped like an
        unreadable image.
        """
        return [self._example(position) for position in self._batch(size)[rank::world]]

    def skip(self, batches: int, size: int) -> None:
        """Skip batches without reading them; with ``group_by_length``, the texts near the new position are read."""
        together = self._data.group_by_length or 1
        groups, rest = divmod(batches, together)
        next(itertools.islice(self._positions, groups * together * size, groups * together * size), None)
        for _ in range(rest):
            self._batch(size)

    def __iter__(self) -> Iterator[list[Piece]]:
        """Yield the examples one by one."""
        while True:
            yield from self.take(1)

    def _batch(self, size: int) -> list[_Position]:
        if not self._data.group_by_length:
            return list(itertools.islice(self._positions, size))
        if not self._ready:
            self._ready = self._grouped(size, self._data.group_by_length)
        batch, self._ready = self._ready[:size], self._ready[size:]
        return batch

    def _grouped(self, size: int, together: int) -> list[_Position]:
        """Sample several batches and return them grouped by length, in a random order of batches."""
        sampled = list(itertools.islice(self._positions, size * together))
        first = sampled[0].number
        sampled.sort(key=lambda position: (self._length(position), position.number))
        batches = [sampled[start : start + size] for start in range(0, len(sampled), size)]
        random.Random(f"{self._seed}/group/{first}").shuffle(batches)
        return [position for batch in batches for position in batch]

    def _length(self, position: _Position) -> int:
        """Return an example's length; 0 if it cannot be read, and is left out."""
        try:
            return length_of(self._example(position), self._lm, self._num_visual)
        except MLLMError:
            return 0

    def _example(self, position: _Position) -> list[Piece]:
        try:
            pieces = self._read(position)
            if self._data.answer_length is not None:
                pieces = with_short_answers(pieces, self._data.answer_length, self._lm)
            if self._data.augment is not None:
                pieces = augmented(pieces, self._data.augment, f"{self._seed}/image/{position.number}")
            limit, cut = self._data.max_length, self._data.truncate == "text"
            return pieces if limit is None else shortened(pieces, limit, self._lm, self._num_visual, cut=cut)
        except MLLMError as error:
            return [Unreadable(f"{position.source.spec.format}, item {position.index}: {error}")]

    def _read(self, position: _Position) -> list[Piece]:
        """Return an example at full length; one of several answers is sampled each time."""
        generator = random.Random(f"{self._seed}/{position.number}")
        spec, items = position.source.spec, position.source.items
        prompt = spec.prompt_over(self._prompt)
        item = items[position.index]
        check_combinable(item, spec)
        parts = [item]
        if spec.shots:
            parts = [replace(item, shots=(*_shots(position, item, generator), *item.shots))]
        elif spec.concatenate and generator.random() < spec.concatenate:
            other = generator.randrange(len(items) - 1)
            parts = [items[other + (other >= position.index)], item]
        pieces: list[Piece] = []
        for part in parts:
            if not spec.unlabeled:
                check_learnable(part)
            check_combinable(part, spec)
            answers = [answer for answer in part.answers if answer.strip()]  # some annotators may have left it empty
            answer = generator.choice(answers) if answers else None
            part = as_text(part, answer) if spec.see == "text" else part
            named = of_caption(prompt.entities, answer, generator) if prompt.entities and not part.question else ""
            given = ""
            if spec.caption_split and answer and part.question is None:
                given, answer = split_at_random(answer, generator)
            example = behind_last_image(pieces_of(part, prompt, answer, self._lm, given), named)
            pieces += [*([SEPARATOR] if pieces else []), *example]
            prompt = prompt.model_copy(update={"examples": [], "system": ""})  # once, at the start
        return pieces


@dataclass(frozen=True)
class Unreadable:
    """A placeholder for an example that cannot be read: an image that raises the reason when it is opened."""

    reason: str

    def open(self) -> Image.Image:
        """Raise an `MLLMError` with the reason."""
        raise MLLMError(self.reason)

    def key(self) -> str:
        """Raise an `MLLMError` with the reason."""
        raise MLLMError(self.reason)


def split_at_random(caption: str, generator: random.Random) -> tuple[str, str]:
    """Return a caption's first words, of which there may be none, and the others, of which there is one at least."""
    words = caption.split()
    number = generator.randrange(len(words))
    return " ".join(words[:number]), " ".join(words[number:])


def _positions(sources: Sequence[Source], seed: int) -> Iterator[_Position]:
    generator = random.Random(f"{seed}/mixture")
    orders = [_shuffled(source.items, f"{seed}/{number}") for number, source in enumerate(sources)]
    weights = [source.spec.weight for source in sources]
    for number in itertools.count():
        which = 0 if len(sources) == 1 else generator.choices(range(len(sources)), weights)[0]
        yield _Position(number, sources[which], next(orders[which]))


def _shuffled(items: Sequence[Item], seed: str) -> Iterator[int]:
    """Yield the indices of items in a new order every epoch; sharded items a few shards at a time."""
    shards = items.shards if isinstance(items, Lazy) else [range(len(items))]
    for epoch in itertools.count():
        generator = random.Random(f"{seed}/{epoch}")
        if len(shards) > 1:
            shards = generator.sample(shards, len(shards))
        for start in range(0, len(shards), MIXED_SHARDS):
            order = list(itertools.chain(*shards[start : start + MIXED_SHARDS]))
            generator.shuffle(order)
            yield from order


def _shots(position: _Position, item: Item, generator: random.Random) -> tuple[Item, ...]:
    """Return solved examples from the item's source that do not show its images."""
    items, count = position.source.items, position.source.spec.shots
    shots: list[Item] = []
    for index in generator.sample(range(len(items)), min(len(items), count + _SPARE)):
        other = items[index] if index != position.index else item
        if len(shots) < count and other.answers and other is not item and not {*item.images} & {*other.images}:
            shots.append(other)
    if len(shots) < count:
        raise MLLMError(f"data.shots is {count}, but only {len(shots)} examples show another image. Lower data.shots.")
    return tuple(shots)
