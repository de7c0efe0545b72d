"""Scale a new connector's output to the language model's embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from mllm.config.recipe import Stage
from mllm.encoders.feature_store import FeatureStore
from mllm.model import Model
from mllm.prompts.pieces import images_of
from mllm.training.batches import Batches, Drawn

CALIBRATION_EXAMPLES = 32


def calibrate_new(model: Model, stage: Stage, batches: Batches, store: FeatureStore) -> None:
    """Scale the connector that a stage trains, unless it was trained, fitted or taken from another run before."""
    if model.calibrated or not stage.trains("connector") or not model.generates_text:
        return
    rows, features, _ = batches.readable(Drawn(batches.stream().take(CALIBRATION_EXAMPLES)))
    images = [image for pieces in rows for image in images_of(pieces)]
    if images:
        features = store(images) if model.encoder_trains or features is None else features
        calibrate(model, model.arranged(features, model.layouts(images)))
    model.calibrated = True


@torch.no_grad()
def calibrate(model: Model, features: Tensor) -> None:
    """Scale a new connector's last map so that its output has the spread of the language model's embeddings.

    From another scale a connector does not learn at usual learning rates.

    Args:
        model: with a connector and a language model.
        features: of real images, as the connector takes them.
    """
    last = model.connector.output()
    if last is None:
        return
    spread = float(model.connector.before_words(features).float().std())
    for parameter in last.parameters():
        parameter.mul_(model.lm.embedding_scale() / max(spread, 1e-12))
