"""Decide whether an image of an answer is retrieved or generated."""

from __future__ import annotations

from mllm.adapters.heads.generation import needed
from torch import Tensor, nn

from mllm.capabilities import DECISIONS, ImageTokenHead
from mllm.registry import Dropout


class DecisionClassifier(ImageTokenHead):
    """A linear classifier on the state at the first token of an image (GILL, arXiv:2305.17216).

    Args:
        lm_dim: D_lm.
        vis_dim: not used.
        token: the token whose state is read.
        dropout: on the state.

    Raises:
        MLLMError: there is no language model.
    """

    def __init__(
        self, *, lm_dim: int | None, vis_dim: int | None = None, token: str = "[IMG0]", dropout: Dropout = 0.5
    ) -> None:
        super().__init__()
        self.tokens, self.labels = (token,), DECISIONS
        self.dropout, self.judge = nn.Dropout(dropout), nn.Linear(needed(lm_dim, "decision"), 2)

    def forward(self, states: Tensor) -> Tensor:
        """Return logits ``(N, 2)``, in the order of `mllm.capabilities.DECISIONS`, of states ``(N, D_lm)``."""
        return self.judge(self.dropout(states.to(self.judge.weight.dtype)))
