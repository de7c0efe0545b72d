"""Describe a stage's batches: how many rows, tokens, targets and images; read from its data, or assumed.

The data are read as training reads them (texts only, no image is opened). Where they are not on this machine, or the
tokenizer is not, a length is assumed and reported as such.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields

from mllm.config.recipe import Stage
from mllm.data.sources import Source, read_all
from mllm.data.stream import Stream
from mllm.errors import MLLMError
from mllm.model import Model
from mllm.prompts.batch import IGNORED, Batch, Encoded, collate
from mllm.prompts.pieces import Piece, Target, images_of

SAMPLE = 2048  # examples that are read
VALIDATION = 32  # rows that are validated on together


@dataclass(frozen=True)
class Rows:
    """One process's part of a batch."""

    pieces: list[list[Piece]]
    batch: Batch | None  # None: there is no language model
    images: int

    @property
    def shown(self) -> list[Piece]:
        """Return the images."""
        return [image for row in self.pieces for image in images_of(row)]

    @property
    def length(self) -> int:
        """Return T, the tokens of the longest row."""
        return 0 if self.batch is None else int(self.batch.ids.shape[1])

    @property
    def packed(self) -> bool:
        """Whether several examples share a row."""
        return self.batch is not None and self.batch.mask.dim() == 3

    def first(self, number: int) -> Rows:
        """Return the first rows, padded as they are together with the others."""
        batch = self.batch and Batch(**{f.name: getattr(self.batch, f.name)[:number] for f in fields(self.batch)})
        return Rows(self.pieces[:number], batch, sum(len(images_of(row)) for row in self.pieces[:number]))


@dataclass(frozen=True)
class Workload:
    """A stage's batches on one process, and the data that the whole stage reads."""

    largest: Rows  # decides memory
    typical: Rows  # decides time
    validation: Rows | None
    examples: int  # of the whole stage, over all processes
    reads: int  # of images, each time that one is read
    images: int  # each counted once
    assumed: str = ""  # what could not be read


def workload(model: Model, stage: Stage, *, processes: int, images: int | None, text: int | None) -> Workload:
    """Return a description of a stage's batches.

    Args:
        model: the stage's, on the meta device or not.
        stage: its data need not be on this machine.
        processes: among which a batch is divided.
        images: the number of images in the data, where it is not to be counted.
        text: the tokens of an example's text, where they are not to be counted.
    """
    sources, missing = _sources(stage)
    countable = model.lm is None or model.lm.tokenizer is not None
    if sources and countable and text is None:
        return _read(model, stage, sources, processes, images)
    length = text or 64
    why = missing or ("the tokenizer is not on this machine" if not countable else "")
    examples = _examples(stage, sources)
    # One row is shorter, as in most batches: attention without any padding takes another code path.
    rows = [_made(model, length - (row == 1)) for row in range(-(-stage.batch_size // processes))]
    one = Rows([_pieces(model)] * len(rows), collate(rows, 0) if model.lm is not None else None, len(rows))
    val = [_made(model, length) for _ in range(VALIDATION)]
    validation = (
        Rows([_pieces(model)] * VALIDATION, collate(val, 0), VALIDATION) if stage.data.val and model.lm else None
    )
    different = min(images or (_images(sources) if sources else examples), examples)
    assumed = f"{length} tokens of text an example" + ("" if sources or images else ", every image read once")
    return Workload(one, one, validation, examples, examples, different, f"{assumed}{f' ({why})' if why else ''}")


def _sources(stage: Stage) -> tuple[list[Source], str]:
    try:
        return read_all(stage.data.train, seed=stage.seed, skip=stage.data.skip), ""
    except (MLLMError, OSError):
        return [], "the data are not on this machine"


def _examples(stage: Stage, sources: Sequence[Source]) -> int:
    if stage.fit is not None or stage.steps is None:
        return sum(len(source.items) for source in sources)
    return stage.steps * stage.batch_size * stage.optim.accumulate


def _read(model: Model, stage: Stage, sources: Sequence[Source], processes: int, images: int | None) -> Workload:
    """Read the first batches as training will, and pick the largest and the median."""
    options = {"lm": model.lm, "num_visual": model.counts, "data": stage.data}
    stream = Stream(sources, stage.prompt, seed=stage.seed, **options)
    examples = _examples(stage, sources)
    number = max(1, min(examples, SAMPLE) // stage.batch_size)
    batches = [
        _rows(model, stream.take(stage.batch_size, rank=0, world=processes), stage.data.pack) for _ in range(number)
    ]
    batches.sort(key=lambda rows: (len(rows.pieces) * rows.length, rows.images))
    reads = [image for rows in batches for pieces in rows.pieces for image in images_of(pieces)]
    each = len(reads) / max(1, sum(len(rows.pieces) for rows in batches))
    whole = examples <= number * stage.batch_size and processes == 1
    different = len(set(reads)) if whole else min(images or _images(sources), round(examples * each))
    validation = None
    if stage.data.val:
        val = Stream(read_all(stage.data.val, skip=stage.data.skip), stage.prompt, seed=0, lm=model.lm)
        validation = _rows(model, val.take(VALIDATION))
    median = batches[len(batches) // 2]
    return Workload(batches[-1], median, validation, examples, round(examples * each), different)


def _rows(model: Model, pieces: list[list[Piece]], pack: int | None = None) -> Rows:
    fitting = []
    for row in pieces:
        try:
            fitting.append((row, model.encode(row) if model.lm is not None else None))
        except MLLMError:  # too long: training leaves it out
            continue
    encoded = [row for _, row in fitting if row is not None]
    images = sum(len(images_of(row)) for row, _ in fitting)
    return Rows([row for row, _ in fitting], collate(encoded, model.lm.pad, pack=pack) if encoded else None, images)


def _pieces(model: Model) -> list[Piece]:
    """Return an example with the image that takes the most tokens."""
    tiling = model.tiling
    layouts = [] if tiling is None else tiling.fullest
    image = max(layouts, key=model.connector.tokens_of) if layouts and model.connector else object()
    return [image, "An image", Target(" of something.")]


def _made(model: Model, text: int) -> Encoded:
    """Return a row of one image and ``text`` tokens, half of them targets."""
    visual = model.tokens_per_image
    targets = max(1, text // 2)
    labels = [IGNORED] * (visual + text - targets) + [1] * targets
    return Encoded([1] * (visual + text), [True] * visual + [False] * text, labels)


def _images(sources: Sequence[Source]) -> int:
    """Return the number of images in the data: where it is not known, a source has one an item."""
    lists = [source.items for source in sources if isinstance(source.items, list)]
    lazy = [source.items for source in sources if not isinstance(source.items, list)]
    others = sum(len(items) if (known := getattr(items, "images", None)) is None else known for items in lazy)
    return others + len({image for item in itertools.chain(*lists) for image in item.images})
