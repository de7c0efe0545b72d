"""Describe a stage's batches: how many rows, tokens, targets and images; read from its data, or assumed.

The data are read as training reads them (texts only, no image is opened). Where they are not on this machine, a length
is assumed; where the tokenizer is not, lengths are estimated by characters. Both are reported.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

from mllm.config.data import Data
from mllm.config.recipe import Stage
from mllm.data.epochs import steps_of
from mllm.data.sources import Source, read_all
from mllm.data.stream import Stream, Unreadable
from mllm.errors import MLLMError
from mllm.model import Model
from mllm.prompts.batch import IGNORED, Batch, Encoded, collate
from mllm.prompts.pieces import Piece, Target, counted, images_of, is_image, text_of

SAMPLE = 2048  # examples that are read
CHARACTERS = 4  # of a token, about, in English
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
    def positions(self) -> int:
        """Return the rows times their length; without a language model, the rows."""
        return len(self.pieces) if self.batch is None else int(self.batch.ids.numel())

    @property
    def packed(self) -> bool:
        """Whether several examples share a row."""
        return self.batch is not None and self.batch.mask.dim() == 3

    def first(self, number: int) -> Rows:
        """Return the first rows, padded as they are together with the others."""
        batch = self.batch and Batch(**{f.name: getattr(self.batch, f.name)[:number] for f in fields(self.batch)})
        return Rows(self.pieces[:number], batch, sum(len(images_of(row)) for row in self.pieces[:number]))


@dataclass(frozen=True)
class Text:
    """The text tokens of an example, of those that were read: their mean and their 99th percentile."""

    mean: float
    most: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Text | None:
        """Return the figures of the lengths of examples; None: there are no examples."""
        if not lengths:
            return None
        return cls(sum(lengths) / len(lengths), sorted(lengths)[math.ceil(0.99 * len(lengths)) - 1])


@dataclass(frozen=True)
class Workload:
    """A stage's batches on one process, and the data that the whole stage reads."""

    largest: Rows  # decides memory
    typical: Rows  # decides time
    validation: Rows | None
    steps: int | None  # None: of a closed-form fit
    examples: int  # of the whole stage, over all processes
    reads: int  # of images, each time that one is read
    images: int  # each counted once
    text: Text | None = None
    assumed: str = ""  # what could not be read


def workload(model: Model, stage: Stage, *, processes: int, images: int | None, text: int | None) -> Workload:
    """Return a description of a stage's batches.

    Args:
        model: the stage's, on the meta device or not.
        stage: its data need not be on this machine.
        processes: among which a batch is divided.
        images: the number of images in the data, where it is not to be counted.
        text: the tokens of an example's text, where they are not to be counted.

    Raises:
        MLLMError: the stage has epochs, and the number of its examples is unknown.
    """
    sources, missing = _sources(stage)
    steps = _steps(stage, sources, images)
    examples = _examples(stage, sources, steps)
    if sources and text is None:
        read = _read(model, stage, sources, processes, images, examples)
        if read is not None:
            return replace(read, steps=steps)
    length = text or 64
    # One row is shorter, as in most batches: attention without any padding takes another code path.
    rows = [_made(model, length - (row == 1)) for row in range(-(-stage.batch_size // processes))]
    one = Rows([_pieces(model)] * len(rows), collate(rows, 0) if model.lm is not None else None, len(rows))
    val = [_made(model, length) for _ in range(VALIDATION)]
    validation = (
        Rows([_pieces(model)] * VALIDATION, collate(val, 0), VALIDATION) if stage.data.val and model.lm else None
    )
    different = min(images or (_images(sources) if sources else examples), examples)
    assumed = f"{length} tokens of text an example" + ("" if sources or images else ", every image read once")
    assumed += f" ({missing})" if missing else ""
    return Workload(one, one, validation, steps, examples, examples, different, assumed=assumed)


def _sources(stage: Stage) -> tuple[list[Source], str]:
    try:
        return read_all(stage.data.train, seed=stage.seed, skip=stage.data.skip), ""
    except (MLLMError, OSError):
        return [], "the data are not on this machine"


def _steps(stage: Stage, sources: Sequence[Source], images: int | None) -> int | None:
    """Return the stage's optimizer steps; ``images`` are its examples, where there are no sources.

    Raises:
        MLLMError: the stage has epochs, and the number of its examples is unknown.
    """
    if stage.epochs is None or sources:
        return steps_of(stage, sources)
    if images is None:
        raise MLLMError(
            f"Stage {stage.name} trains for {stage.epochs:g} epochs of data that are not on this machine. Give their "
            "number: --images 558000."
        )
    return math.ceil(stage.epochs * images / (stage.batch_size * stage.optim.accumulate))


def _examples(stage: Stage, sources: Sequence[Source], steps: int | None) -> int:
    if stage.fit is not None or steps is None:
        return sum(len(source.items) for source in sources)
    return steps * stage.batch_size * stage.optim.accumulate


def _read(
    model: Model, stage: Stage, sources: Sequence[Source], processes: int, images: int | None, examples: int
) -> Workload | None:
    """Read the first batches as training will, and pick the largest and the average one; None: all are too long.

    Without the tokenizer, tokens are estimated by characters.
    """
    known = model.lm is None or model.lm.tokenizer is not None
    encode = model.encode if known else partial(_by_characters, model)
    data = stage.data if known else Data()  # limits of length count tokens
    lm = model.lm if known else None
    stream = Stream(sources, stage.prompt, seed=stage.seed, lm=lm, num_visual=model.counts, data=data)
    share = -(-stage.batch_size // processes)
    number = max(1, min(examples // stage.batch_size, SAMPLE // share))
    read = [
        _rows(model, stream.take(stage.batch_size, rank=0, world=processes), encode, data.pack) for _ in range(number)
    ]
    batches = [rows for rows, _ in read if rows.pieces]
    if not batches:
        return None
    largest = max(batches, key=_size)
    mean = sum(rows.positions for rows in batches) / len(batches)
    reads = [image for rows in batches for pieces in rows.pieces for image in images_of(pieces)]
    each = len(reads) / sum(len(rows.pieces) for rows in batches)
    whole = examples <= number * stage.batch_size and processes == 1
    different = len(set(reads)) if whole else min(images or _images(sources), round(examples * each))
    validation = None
    if stage.data.val:
        val = Stream(read_all(stage.data.val, skip=stage.data.skip), stage.prompt, seed=0, lm=lm)
        validation, _ = _rows(model, val.take(VALIDATION), encode)
    return Workload(
        largest,
        min(batches, key=lambda rows: abs(rows.positions - mean)),
        validation,
        None,
        examples,
        round(examples * each),
        different,
        Text.of([length for _, lengths in read for length in lengths]),
        "" if known else f"{CHARACTERS} characters a token (the tokenizer is not on this machine)",
    )


def _size(rows: Rows) -> tuple[int, int]:
    return rows.positions, rows.images


def _rows(
    model: Model, pieces: list[list[Piece]], encode: Callable[[list[Piece]], Encoded], pack: int | None = None
) -> tuple[Rows, list[int]]:
    """Return examples that fit as rows, and the text tokens of each."""
    fitting = []
    for row in pieces:
        if any(isinstance(piece, Unreadable) for piece in row):
            continue
        try:
            fitting.append((row, encode(row) if model.lm is not None else None))
        except MLLMError:  # too long: training leaves it out
            continue
    encoded = [row for _, row in fitting if row is not None]
    images = sum(len(images_of(row)) for row, _ in fitting)
    pad = 0 if model.lm is None or model.lm.tokenizer is None else model.lm.pad
    batch = collate(encoded, pad, pack=pack) if encoded else None
    return Rows([row for row, _ in fitting], batch, images), [len(row.ids) - sum(row.visual) for row in encoded]


def _by_characters(model: Model, pieces: Sequence[Piece]) -> Encoded:
    """Return an example's visual tokens, and about as many others as a tokenizer would make of its texts."""
    visual = sum(counted(images_of(pieces), model.counts))
    texts = [piece for piece in pieces if not is_image(piece)]
    targets = _tokens(piece for piece in texts if isinstance(piece, Target))
    return _encoded(visual, _tokens(piece for piece in texts if not isinstance(piece, Target)) + targets, targets)


def _tokens(texts: Iterable[Piece]) -> int:
    return math.ceil(sum(len(text_of(text)) for text in texts) / CHARACTERS)


def _pieces(model: Model) -> list[Piece]:
    """Return an example with the image that takes the most tokens."""
    tiling = model.tiling
    layouts = [] if tiling is None else tiling.fullest
    image = max(layouts, key=model.connector.tokens_of) if layouts and model.connector else object()
    return [image, "An image", Target(" of something.")]


def _made(model: Model, text: int) -> Encoded:
    """Return a row of one image and ``text`` tokens, half of them targets."""
    return _encoded(model.tokens_per_image, text, max(1, text // 2))


def _encoded(visual: int, text: int, targets: int) -> Encoded:
    """Return a row of visual tokens and text, the last tokens of which are targets."""
    labels = [IGNORED] * (visual + text - targets) + [1] * targets
    return Encoded([1] * (visual + text), [True] * visual + [False] * text, labels)


def _images(sources: Sequence[Source]) -> int:
    """Return the number of images in the data: where it is not known, a source has one an item."""
    lists = [source.items for source in sources if isinstance(source.items, list)]
    lazy = [source.items for source in sources if not isinstance(source.items, list)]
    others = sum(len(items) if (known := getattr(items, "images", None)) is None else known for items in lazy)
    return others + len({image for item in itertools.chain(*lists) for image in item.images})
