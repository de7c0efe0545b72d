"""Losses over one batch. An objective is a function of the model, the visual tokens and the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mllm.prompt import IGNORED, Batch


def caption(model: Any, visual: Tensor | None, batch: Batch) -> tuple[Tensor, int]:
    """Return the summed negative log-likelihood of the target tokens, and how many there are.

    Logits are made for the positions before targets only. A sum and a count, not a mean: batches that are accumulated,
    or spread over processes, weigh each token the same.
    """
    labels = batch.labels[:, 1:]
    keep = (labels != IGNORED).any(0).nonzero().squeeze(1)  # (K,)
    logits = model.logits(visual, batch, keep)  # (B, K, V)
    wanted = labels[:, keep]
    loss = cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss, int(torch.count_nonzero(wanted != IGNORED))
