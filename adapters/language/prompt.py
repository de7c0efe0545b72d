"""Prompt tuning (arXiv:2104.08691): learned embeddings before every sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mllm.lms.adapting import Switchable


class PromptTuning(Switchable):
    """Put learned embeddings before every sequence; an encoder-decoder model's encoder reads them.

    Args:
        model: a language model of `transformers`; it stays as it is.
        positions: how many.
    """

    def __init__(self, model: Any, *, positions: int = 20) -> None:
        super().__init__()
        table = model.get_input_embeddings()
        ids = torch.randint(0, table.weight.shape[0], (positions,)).to(table.weight.device)
        with torch.no_grad():
            words = table(ids).float()  # they start as tokens drawn from the vocabulary
        self.weight = nn.Parameter(words.clone())  # (positions, D_lm)

    @property
    def num_positions(self) -> int:
        """Return how many positions come first."""
        return len(self.weight) if self.on else 0

    def embeddings(self, rows: int) -> Tensor:
        """Return what comes first in each of ``rows`` rows, ``(B, positions, D_lm)``."""
        return self.weight.expand(rows, -1, -1)
