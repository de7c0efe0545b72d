"""Whether an image that is to be shown is looked up or made."""

from __future__ import annotations

from mllm.adapters.heads.generation import needed
from torch import Tensor, nn

from mllm.capabilities import DECISIONS, ImageTokenHead


class Decision(ImageTokenHead):
    """A linear classifier on the state at the first token of an image (GILL, arXiv:2305.17216).

    Args:
        lm_dim: D_lm.
        vis_dim: not used.
        token: that the state is read at.
        dropout: of the state, in training.

    Raises:
        MLLMError: no language model.
    """

    def __init__(
        self, *, lm_dim: int | None, vis_dim: int | None = None, token: str = "[IMG0]", dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.tokens, self.labels = (token,), DECISIONS
        self.dropout, self.judge = nn.Dropout(dropout), nn.Linear(needed(lm_dim, "decision"), 2)

    def forward(self, states: Tensor) -> Tensor:
        """Return logits ``(N, 2)``, in the order of `mllm.capabilities.DECISIONS`, of states ``(N, D_lm)``."""
        return self.judge(self.dropout(states.to(self.judge.weight.dtype)))
