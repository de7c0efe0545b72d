"""Compare images with texts by a Q-Former's states: BLIP-2's contrast and matching heads (arXiv:2301.12597)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mllm.registry import Count, Positive
from mllm.slots import Head


class ContrastMaps(Head):
    """Two linear layers into one space, and a learned temperature.

    Args:
        inside: width of the states.
        dim: width of the space.
        temperature: its initial value.
        vis_dim: not used.
        lm_dim: not used.
    """

    def __init__(
        self,
        *,
        inside: Count = 768,
        dim: Count = 256,
        temperature: Positive = 0.07,
        vis_dim: int | None = None,
        lm_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.vision, self.text = nn.Linear(inside, dim), nn.Linear(inside, dim)
        self.temperature = nn.Parameter(torch.tensor(temperature))

    def forward(self, queries: Tensor, text: Tensor) -> Tensor:
        """Return similarities ``(I, N)``, the maximum over queries, of states ``(I, Q, D)`` and ``(N, D)``."""
        return (self.of_queries(queries) @ self.of_texts(text).T).amax(1)

    def of_queries(self, states: Tensor) -> Tensor:
        """Return vectors ``(I, Q, dim)`` of length 1 of images' states ``(I, Q, D)``."""
        return nn.functional.normalize(self.vision(states.to(self.vision.weight.dtype)), dim=-1)

    def of_texts(self, states: Tensor) -> Tensor:
        """Return vectors ``(N, dim)`` of length 1 of texts' states ``(N, D)``."""
        return nn.functional.normalize(self.text(states.to(self.text.weight.dtype)), dim=-1)


class MatchClassifier(Head):
    """A linear classifier of whether an image and a text match; its logits are averaged over the queries.

    Args:
        inside: width of the states.
        vis_dim: not used.
        lm_dim: not used.
    """

    def __init__(self, *, inside: Count = 768, vis_dim: int | None = None, lm_dim: int | None = None) -> None:
        super().__init__()
        self.judge = nn.Linear(inside, 2)

    def match(self, queries: Tensor) -> Tensor:
        """Return logits of no and yes ``(B, 2)`` of the queries' states ``(B, Q, D)``."""
        return self.judge(queries.to(self.judge.weight.dtype)).mean(1)
