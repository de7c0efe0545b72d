"""Validate while training: the objectives' mean loss over held-out examples, the best tensors, and when to stop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mllm.config.recipe import Stage
from mllm.data.sources import read_all
from mllm.data.stream import Stream
from mllm.encoders.feature_store import FeatureStore
from mllm.model import Model
from mllm.prompts.pieces import Piece, images_of
from mllm.slots import Objective
from mllm.training.batches import inputs
from mllm.training.checkpoint import TrainingState
from mllm.training.setup import Objectives

VALIDATION_ITEMS = 256


@dataclass(frozen=True)
class Validation:
    """A stage's validation.

    Args:
        model: what is validated.
        stage: how often, what is kept, and the patience.
        rows: the held-out examples; none: nothing is validated.
        store: of the encoder's features.
        objectives: whose loss is computed.
        state: keeps the lowest loss, its tensors, and how long ago it was.
    """

    model: Model
    stage: Stage
    rows: Sequence[list[Piece]]
    store: FeatureStore
    objectives: Objectives
    state: TrainingState

    def due(self, step: int) -> bool:
        """Whether to validate after a step: every ``validate_every`` steps, and after the last one."""
        every = self.stage.validate_every
        return bool(self.rows) and (step == self.stage.steps or bool(every and step % every == 0))

    def __call__(self) -> float:
        """Return the loss, and note in the state whether it is the lowest so far."""
        loss = validate(self.model, self.rows, self.store, self.objectives.losses, self.objectives.weights)
        if self.state.best_loss is None or loss < self.state.best_loss:
            self.state.best_loss, self.state.waited = loss, 0
            if self.stage.keep == "best":
                self.state.best = {name: tensor.clone() for name, tensor in self.model.trained_state().items()}
        else:
            self.state.waited += 1
        return loss

    @property
    def impatient(self) -> bool:
        """Whether the loss has not fallen for ``patience`` validations."""
        return self.stage.patience is not None and self.state.waited >= self.stage.patience

    def restore_best(self) -> None:
        """Load the tensors that had the lowest loss, where they are kept."""
        if self.state.best:
            self.model.load_state_dict(self.state.best, strict=False)


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
    """Return the weighted sum of the objectives' mean losses over examples, ``size`` of them at once."""
    model.eval()
    totals, counts = torch.zeros(len(objectives)), torch.zeros(len(objectives))
    for start in range(0, len(rows), size):
        part, features, batch = inputs(model, rows[start : start + size], store)
        totals += torch.stack(model(part, features, batch, objectives)).float().cpu()
        counts += torch.tensor([float(objective.count(part, batch)) for objective in objectives])
    return float((totals / counts.clamp(min=1) * torch.tensor(weights)).sum())


def validation_rows(stage: Stage, model: Model) -> list[list[Piece]]:
    """Return the validation examples as interleaved prompts.

    Raises:
        MLLMError: an image cannot be opened, which is noticed here and not after hours.
    """
    sources = read_all(stage.data.val, skip=stage.data.skip)
    number = min(VALIDATION_ITEMS, sum(len(source.items) for source in sources))
    rows = (
        Stream(sources, stage.prompt, seed=0, lm=model.lm if model.generates_text else None).take(number)
        if sources
        else []
    )
    for image in (image for pieces in rows for image in images_of(pieces) if model.encoder is not None):
        model.encoder.open(image)
    return rows
