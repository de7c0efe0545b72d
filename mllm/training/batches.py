"""Draw a stage's batches, turn them into the model's inputs, and split them so that few rows are computed at once.

Notable: the parts of a batch go through the language model one after another. The gradient of a step is the same sum,
so only memory changes, and on a CPU the speed: a layer's activations of few rows stay in the processor's cache.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mllm.config.recipe import Stage
from mllm.data.skipping import Skipped
from mllm.data.sources import Source, read_all
from mllm.data.stream import Stream
from mllm.encoders.feature_store import FeatureStore
from mllm.errors import MLLMError
from mllm.model import Model
from mllm.prompts.batch import Batch, collate
from mllm.prompts.pieces import Piece, images_of
from mllm.training.setup import Micro, Objectives, Rows
from mllm.training.sharding import divided

POSITIONS = 1024  # of a part on a CPU, in float32: four rows of LLaVA's 196 visual tokens and their text

Part = tuple[Rows, Tensor | None, Batch]


class Drawn(NamedTuple):
    """A batch's examples, drawn and encoded in a thread.

    Args:
        rows: the examples.
        batch: their ids, on the host; None where the model generates no text, or a prompt cannot be encoded.
    """

    rows: Rows
    batch: Batch | None = None


def training_sources(stage: Stage) -> list[Source]:
    """Return the sources of a stage's training data.

    Raises:
        MLLMError: the stage has none, or a reader refuses its files.
    """
    sources = read_all(stage.data.train, seed=stage.seed, skip=stage.data.skip)
    if not sources:
        raise MLLMError(f"Stage {stage.name} has no data: give data.train.")
    return sources


class Batches:
    """A stage's batches: drawn with its seed, prepared in advance, without the examples that cannot be read.

    Args:
        model: what they are encoded for.
        stage: batch size, accumulation, prompt and lengths.
        sources: of the examples.
        store: of the encoder's features.
        log: is called with each example that is left out.
        solved: whether the prompt's solved examples stand before each training example.
        rank: this process.
        world: the number of processes that share a batch.
    """

    def __init__(
        self,
        model: Model,
        stage: Stage,
        sources: Sequence[Source],
        store: FeatureStore,
        log: Callable[..., None],
        *,
        solved: bool = True,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._model, self._stage, self._sources, self._store = model, stage, sources, store
        self._prompt = stage.prompt if solved else stage.prompt.model_copy(update={"examples": []})
        total = sum(len(source.items) for source in sources)
        self._skipped = Skipped(stage.data.skip, total, partial(log, stage=stage.name))
        self._rank, self._world = rank, world

    def steps(self, done: int, total: int) -> Iterator[tuple[int, list[Drawn]]]:
        """Yield each step's number and its accumulated batches, while those of the next step are being prepared.

        ``done``: steps that are passed over; none of their images is opened.
        """
        stream = self.stream()
        stream.skip(done * self._stage.optim.accumulate, self._stage.batch_size)
        with ThreadPoolExecutor(1) as loader:
            upcoming = loader.submit(self._take, stream)
            for step in range(done + 1, total + 1):
                batches = upcoming.result()
                if step < total:
                    upcoming = loader.submit(self._take, stream)
                yield step, batches

    def stream(self) -> Stream:
        """Return the stage's examples from the first one on."""
        return Stream(
            self._sources,
            self._prompt,
            seed=self._stage.seed,
            lm=self._model.lm if self._model.generates_text else None,
            num_visual=self._model.counts,
            data=self._stage.data,
        )

    def readable(self, drawn: Drawn) -> Micro:
        """Return a batch's inputs without the examples that are unreadable or too long, which are sought on failure.

        The others weigh by their tokens, as always; and a run that is resumed leaves out the same examples.
        """
        pack = self._stage.data.pack
        try:
            return inputs(self._model, drawn.rows, self._store, pack=pack, batch=drawn.batch)
        except MLLMError:
            rows = self._skipped.readable(drawn.rows, self._read)
            return inputs(self._model, rows, self._store, pack=pack)

    def _take(self, stream: Stream) -> list[Drawn]:
        """Return a step's batches, and start to prepare their images."""
        stage = self._stage
        batches: list[Rows] = [
            stream.take(stage.batch_size, rank=self._rank, world=self._world) for _ in range(stage.optim.accumulate)
        ]
        if self._model.encoder is not None:
            self._store.expect([image for rows in batches for pieces in rows for image in images_of(pieces)])
        return [Drawn(rows, self._encoded(rows)) for rows in batches]

    def _encoded(self, rows: Rows) -> Batch | None:
        with contextlib.suppress(MLLMError):  # it is raised where the batch is used, and its examples can be left out
            return encoded(self._model, rows, pack=self._stage.data.pack)
        return None

    def _read(self, pieces: list[Piece]) -> None:
        """Raise the error of an example that cannot be read."""
        if self._model.generates_text:
            self._model.encode(pieces)
        for image in images_of(pieces) if self._model.encoder is not None else []:
            self._model.encoder.open(image)


def encoded(model: Model, rows: Rows, *, pack: int | None = None) -> Batch | None:
    """Return the ids of examples, on the host; None: the model generates no text.

    ``pack``: the length of a row that several examples share.
    """
    if not model.generates_text:
        return None
    return collate([model.encode(pieces) for pieces in rows], model.lm.pad, pack=pack)


def inputs(
    model: Model, rows: Rows, store: FeatureStore, *, pack: int | None = None, batch: Batch | None = None
) -> Micro:
    """Return examples, features ``(U, P, D_vis)`` of their tiles (while the encoder trains, pixels), and their ids.

    Args:
        model: what they are for.
        rows: the examples.
        store: of the encoder's features.
        pack: as for `encoded`.
        batch: what `encoded` has returned; None: it is called.
    """
    images = [image for pieces in rows for image in images_of(pieces)]
    batch = encoded(model, rows, pack=pack) if batch is None else batch
    batch = None if batch is None else batch.to(model.device)
    if not images or model.encoder is None:
        return rows, None, batch
    return rows, store.units(images) if model.encoder_trains else store(images), batch


def check_augmentation(stage: Stage, model: Model) -> None:
    """Check that ``data.augment`` has images to change.

    Raises:
        MLLMError: the encoder reads something else.
    """
    if stage.data.augment is not None and not (model.encoder is not None and model.encoder.reads_images):
        raise MLLMError(
            "data.augment changes images, and this stage has no encoder that reads images. Leave out data.augment."
        )


def check_packing(stage: Stage, model: Model, objectives: Objectives) -> None:
    """Check that examples may share a row, where ``data.pack`` asks for it.

    Raises:
        MLLMError: an objective compares examples, or the language model does not keep them apart.
    """
    if stage.data.pack is None:
        return
    if objectives.comparing:
        raise MLLMError(
            f"data.pack: the objective {objectives.comparing[0]!r} needs a row for each example. Leave data.pack out."
        )
    if not model.lm.can_pack():
        raise MLLMError(
            "data.pack: in this language model examples that share a row influence each other, or it accepts no mask "
            "that keeps them apart (tried with two short ones). Leave data.pack out; data.group_by_length saves "
            "padding, too."
        )


def parts(model: Model, objectives: Objectives, micro: Micro) -> Sequence[Micro]:
    """Return a batch in parts that are computed one after another: on a CPU few rows each, if objectives allow it.

    Processes that share the weights compute their layers together, so they do not split a batch.
    """
    rows, features, batch = micro
    if batch is None or batch.mask.dim() == 3 or objectives.comparing or model.device.type != "cpu":  # 3: packed
        return [micro]
    if divided(model.lm):
        return [micro]
    size = rows_at_once(len(batch.ids), batch.ids.shape[1], model.lm.model.dtype)
    return split(rows, features, batch, size=size, tiles=model.tiles_of)


def rows_at_once(rows: int, length: int, dtype: torch.dtype) -> int:
    """Return how many of ``rows`` rows of ``length`` tokens a CPU computes at once, so that the parts are even.

    ``dtype`` is the language model's: the smaller its numbers, the more rows.
    """
    most = max(1, POSITIONS * torch.float32.itemsize // dtype.itemsize // length)
    return math.ceil(rows / math.ceil(rows / most))


def split(
    rows: Rows, features: Tensor | None, batch: Batch, *, size: int, tiles: Callable[[Sequence[Any]], int] = len
) -> list[Part]:
    """Return a batch in parts of ``size`` rows; the last one has the rest.

    Args:
        rows: the examples.
        features: ``(U, ...)`` of their tiles in reading order, or None where there are none.
        batch: their ids ``(B, T)``.
        size: rows of a part.
        tiles: the number of tiles of images.
    """
    counts = [tiles(images_of(pieces)) for pieces in rows]
    result: list[Part] = []
    for start in range(0, len(rows), size):
        end = start + size
        first, last = sum(counts[:start]), sum(counts[:end])
        section = None if features is None or first == last else features[first:last]
        tensors = (batch.ids, batch.visual, batch.mask, batch.labels)
        result.append((rows[start:end], section, Batch(*(tensor[start:end] for tensor in tensors))))
    return result
