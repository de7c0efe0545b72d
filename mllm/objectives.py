"""Losses over one batch. An objective is a function of the model, the visual tokens and the batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mllm.prompt import Batch


def caption(model: Any, visual: Tensor | None, batch: Batch) -> tuple[Tensor, int]:
    """Return the summed negative log-likelihood of the target tokens, and how many there are.

    A sum and a count, not a mean: batches that are accumulated, or spread over processes, weigh each token the same.
    """
    losses = model.lm.losses(model.embed(visual, batch), batch.mask, batch.labels)  # (N,)
    return losses.sum(), len(losses)
