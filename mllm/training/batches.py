"""A batch in parts that go through the language model one after another.

Notable: a step's gradient is the same sum, so nothing changes but memory, and on a CPU speed: what a layer makes of few
rows stays in the processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mllm.config.recipe import Stage
from mllm.data.sources import Source, read_all
from mllm.encoders.feature_store import FeatureStore
from mllm.errors import MLLMError
from mllm.model import Model
from mllm.prompts.batch import Batch, collate
from mllm.prompts.pieces import Piece, images_of
from mllm.slots import Objective
from mllm.training.sharding import divided

POSITIONS = 1024  # of a part on a CPU, in float32: four rows of LLaVA's 196 visual tokens and their text

Part = tuple[Sequence[list[Piece]], Tensor | None, Batch]


def rows_at_once(rows: int, length: int, dtype: torch.dtype) -> int:
    """Return how many of ``rows`` rows of ``length`` positions a CPU computes at once, in parts as even as can be.

    ``dtype`` is the language model's: the smaller its numbers, the more.
    """
    most = max(1, POSITIONS * torch.float32.itemsize // dtype.itemsize // length)
    return math.ceil(rows / math.ceil(rows / most))


def split(rows: Sequence[list[Piece]], features: Tensor | None, batch: Batch, *, size: int) -> list[Part]:
    """Return a batch in parts of ``size`` rows, the last of what is left.

    Args:
        rows: the examples.
        features: ``(I, ...)`` of their images in reading order, or None where there are none.
        batch: their ids ``(B, T)``.
        size: rows of a part.
    """
    counts = [len(images_of(pieces)) for pieces in rows]
    parts: list[Part] = []
    for start in range(0, len(rows), size):
        end = start + size
        first, last = sum(counts[:start]), sum(counts[:end])
        own = None if features is None or first == last else features[first:last]
        tensors = (batch.ids, batch.visual, batch.mask, batch.labels)
        parts.append((rows[start:end], own, Batch(*(tensor[start:end] for tensor in tensors))))
    return parts


Micro = tuple[Sequence[list[Piece]], Tensor | None, Batch | None]  # rows, features, ids


def inputs(model: Model, rows: Sequence[list[Piece]], store: FeatureStore, *, pack: int | None = None) -> Micro:
    """Return examples with their features ``(I, P, D_vis)``, or pixels while the encoder trains, and their ids.

    ``pack``: positions of a row that several examples share.
    """
    images = [image for pieces in rows for image in images_of(pieces)]
    batch = None
    if model.generates_text:
        batch = collate([model.encode(pieces) for pieces in rows], model.lm.pad, pack=pack).to(model.device)
    if not images or model.encoder is None:
        return rows, None, batch
    if model.encoder_trains:
        return rows, model.encoder.preprocess([store.opened(image) for image in images]).to(model.device), batch
    return rows, store(images).to(model.device), batch


def parts(model: Model, objectives: Sequence[Objective], micro: Micro) -> Sequence[Micro]:
    """Return what goes through the model at once: on a CPU few rows, if objectives look at each by itself.

    Processes that share the weights pass through them together, so they go by whole batches.
    """
    rows, features, batch = micro
    apart = all(objective.per_example for objective in objectives)
    if batch is None or batch.mask.dim() == 3 or not apart or model.device.type != "cpu":  # 3: packed
        return [micro]
    if divided(model.lm):
        return [micro]
    return split(rows, features, batch, size=rows_at_once(len(batch.ids), batch.ids.shape[1], model.lm.model.dtype))


def data(stage: Stage, seed: int) -> list[Source]:
    """Return a stage's sources.

    Raises:
        MLLMError: it has none, or what a reader finds wrong.
    """
    sources = read_all(stage.data.train, seed=seed)
    if not sources:
        raise MLLMError(f"Stage {stage.name} has no data: give data.train.")
    return sources
