"""Whether to look an image up or to make it: learnt from labels, asked of prompts (GILL, arXiv:2305.17216)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mllm.capabilities import DecisionHead
from mllm.prompts.batch import Batch
from mllm.prompts.pieces import Piece
from mllm.readout.decision import labelled, states_at
from mllm.slots import Inputs, LanguageModel


class Decision:
    """The negative log-likelihood of an example's label, its target, at the token put behind what stands before it."""

    needs = (LanguageModel, DecisionHead)
    per_example = False

    def count(self, rows: Sequence[Sequence[Piece]], batch: Batch | None) -> int:
        """Return the number of examples."""
        return len(rows)

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over examples."""
        prompts, labels = zip(*map(labelled, inputs.rows), strict=True)
        trains = inputs.model.lm_trains or any(p.requires_grad for p in inputs.model.tokens.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            states = states_at(inputs.model, prompts, inputs.visual)
        logits = inputs.model.find(DecisionHead)(states)
        return cross_entropy(logits, torch.tensor(labels, device=logits.device), reduction="sum")
