"""Train on captions and answers: the language modeling loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mllm.prompts.batch import IGNORED, Batch
from mllm.prompts.pieces import Piece
from mllm.registry import Dropout
from mllm.slots import Inputs, LanguageModel


class Caption:
    """The negative log-likelihood of the target tokens: captions, answers, an assistant's turns.

    Args:
        smoothing: label smoothing; in the validation loss, too.
    """

    needs = (LanguageModel,)
    per_example = True

    def __init__(self, *, smoothing: Dropout = 0.0) -> None:
        self.smoothing = smoothing

    def count(self, rows: Sequence[Sequence[Piece]], batch: Batch | None) -> int:
        """Return the number of target tokens."""
        assert batch is not None
        return int(torch.count_nonzero(batch.labels[:, 1:] != IGNORED))

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over target tokens."""
        model, batch = inputs.model, inputs.batch
        assert batch is not None
        embeds, options = model.embed(inputs.visual, batch), {"smoothing": self.smoothing} if self.smoothing else {}
        losses: Tensor = model.lm.losses(embeds, batch.mask, batch.labels, **options)  # (N,)
        return losses.sum()
