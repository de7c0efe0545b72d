"""Scale a new connector's output to the language model's embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from mllm.model import Model


@torch.no_grad()
def calibrate(model: Model, features: Tensor) -> None:
    """Scale a new connector's last map so that its output has the spread of the language model's embeddings.

    A start far from that scale does not learn at usual learning rates. Args: features ``(I, P, D_vis)`` of real images.
    """
    last = model.connector.output()
    if last is None:
        return
    spread = float(model.connector(features).float().std())
    for parameter in last.parameters():
        parameter.mul_(model.lm.embedding_scale() / max(spread, 1e-12))
