"""Validate: the objectives' mean loss over held-out examples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mllm.config.recipe import Stage
from mllm.data.sources import read_all
from mllm.data.stream import Stream
from mllm.encoders.feature_store import FeatureStore
from mllm.model import Model
from mllm.prompts.pieces import Piece, images_of
from mllm.slots import Objective
from mllm.training.batches import inputs

VALIDATION_ITEMS = 256


@torch.no_grad()
def validate(
    model: Model,
    rows: Sequence[list[Piece]],
    store: FeatureStore,
    objectives: Sequence[Objective],
    weights: Sequence[float],
    *,
    size: int = 32,
) -> float:
    """Return the weighted sum of the objectives' mean losses over examples."""
    model.eval()
    totals, counts = torch.zeros(len(objectives)), torch.zeros(len(objectives))
    for start in range(0, len(rows), size):
        part, features, batch = inputs(model, rows[start : start + size], store)
        totals += torch.stack(model(part, features, batch, objectives)).float().cpu()
        counts += torch.tensor([float(objective.count(part, batch)) for objective in objectives])
    return float((totals / counts.clamp(min=1) * torch.tensor(weights)).sum())


def validation_rows(stage: Stage, model: Model) -> list[list[Piece]]:
    """Return the validation examples as interleaved prompts; an image that cannot be opened is an error now."""
    sources = read_all(stage.data.val)
    number = min(VALIDATION_ITEMS, sum(len(source.items) for source in sources))
    rows = (
        Stream(sources, stage.prompt, seed=0, lm=model.lm if model.generates_text else None).take(number)
        if sources
        else []
    )
    for image in (image for pieces in rows for image in images_of(pieces) if model.encoder is not None):
        model.encoder.open(image)  # one that cannot be read is found now, not after hours
    return rows


def without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names do not start with the prefix."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
