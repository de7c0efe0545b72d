"""Prepend learned embeddings to every sequence: prompt tuning (arXiv:2104.08691)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mllm.lms.adapting import Switchable
from mllm.registry import Count


class PromptTuning(Switchable):
    """Prepend learned embeddings to every sequence; in an encoder-decoder model, to the encoder's.

    Args:
        model: a language model of `transformers`; it does not change.
        positions: the prompt length.
    """

    def __init__(self, model: Any, *, positions: Count = 20) -> None:
        super().__init__()
        table = model.get_input_embeddings()
        ids = torch.randint(0, table.weight.shape[0], (positions,)).to(table.weight.device)
        with torch.no_grad():
            embeds = table(ids).float()  # initialized from random tokens of the vocabulary
        self.weight = nn.Parameter(embeds.clone())  # (positions, D_lm)

    @property
    def num_positions(self) -> int:
        """Return the prompt length; 0 while the adapter is off."""
        return len(self.weight) if self.on else 0

    def embeddings(self, rows: int) -> Tensor:
        """Return the learned embeddings ``(B, positions, D_lm)`` for ``rows`` rows."""
        return self.weight.expand(rows, -1, -1)
