"""Train on captions and answers: the language model's own loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mllm.prompts.batch import IGNORED, Batch
from mllm.prompts.pieces import Piece
from mllm.slots import Inputs, LanguageModel


class Caption:
    """The negative log-likelihood of the target tokens: captions, answers, what an assistant says."""

    needs = (LanguageModel,)
    per_example = True

    def count(self, rows: Sequence[Sequence[Piece]], batch: Batch | None) -> int:
        """Return the number of target tokens."""
        assert batch is not None
        return int(torch.count_nonzero(batch.labels[:, 1:] != IGNORED))

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over target tokens."""
        model, batch = inputs.model, inputs.batch
        assert batch is not None
        losses: Tensor = model.lm.losses(model.embed(inputs.visual, batch), batch.mask, batch.labels)  # (N,)
        return losses.sum()
