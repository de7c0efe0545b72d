"""What a transformer that reads pictures and texts says of pairs: how alike they are, and whether they match.

As in BLIP-2's first stage (arXiv:2301.12597).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mllm.slots import Head


class Contrast(Head):
    """Two maps into one space, and a temperature that is learnt.

    Args:
        inside: width of the states.
        dim: of the space.
        temperature: where it starts.
        vis_dim: not used.
        lm_dim: not used.
    """

    def __init__(
        self,
        *,
        inside: int = 768,
        dim: int = 256,
        temperature: float = 0.07,
        vis_dim: int | None = None,
        lm_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.vision, self.text = nn.Linear(inside, dim), nn.Linear(inside, dim)
        self.temperature = nn.Parameter(torch.tensor(temperature))

    def forward(self, queries: Tensor, text: Tensor) -> Tensor:
        """Return similarities ``(I, N)`` of pictures' states ``(I, Q, D)`` and texts' ``(N, D)``.

        A picture is as like a text as that of its queries which is most like it.
        """
        return (self.of_queries(queries) @ self.of_texts(text).T).amax(1)

    def of_queries(self, states: Tensor) -> Tensor:
        """Return vectors ``(I, Q, dim)`` of length 1 of pictures' states ``(I, Q, D)``."""
        return nn.functional.normalize(self.vision(states), dim=-1)

    def of_texts(self, states: Tensor) -> Tensor:
        """Return vectors ``(N, dim)`` of length 1 of texts' states ``(N, D)``."""
        return nn.functional.normalize(self.text(states), dim=-1)


class Match(Head):
    """Logits of no and yes, averaged over the queries.

    Args:
        inside: width of the states.
        vis_dim: not used.
        lm_dim: not used.
    """

    def __init__(self, *, inside: int = 768, vis_dim: int | None = None, lm_dim: int | None = None) -> None:
        super().__init__()
        self.judge = nn.Linear(inside, 2)

    def match(self, queries: Tensor) -> Tensor:
        """Return logits of no and yes ``(B, 2)`` of the queries' states ``(B, Q, D)``."""
        return self.judge(queries).mean(1)
