"""One linear map: per patch, per cell, or from one pooled vector to k tokens (Frozen, LiMBeR, FROMAGe)."""

from __future__ import annotations

from einops import rearrange
from mllm.adapters.connectors.reduce import Reduce
from torch import Tensor, nn

from mllm.errors import MLLMError
from mllm.slots import Connector


class Linear(Connector):
    """Features ``(B, P, D_vis)`` to visual tokens ``(B, Q, D_lm)`` by one linear map.

    Args:
        vis_dim: D_vis.
        lm_dim: D_lm.
        num_patches: P.
        grid: rows and columns of the patches, or None.
        tokens: Q. None: one token a patch. A square number smaller than P: the grid is averaged to that many cells
            first. With a single feature vector (P = 1): the map gives all Q tokens at once.
        shuffle: s x s neighbours are put side by side first (pixel shuffle).
        norm: a LayerNorm after the map (MAGMA).
        dropout: after the map (LiMBeR: 0.1).

    Attributes:
        num_tokens: Q.
        project: the linear map to the language model's width.

    Raises:
        MLLMError: the patches cannot be reduced so.
    """

    def __init__(
        self,
        *,
        vis_dim: int,
        lm_dim: int | None,
        num_patches: int,
        grid: tuple[int, int] | None,
        tokens: int | None = None,
        shuffle: int | None = None,
        norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if lm_dim is None:
            raise MLLMError("The connector linear is a map to a language model's width: give lm.")
        self.body = Reduce(vis_dim=vis_dim, num_patches=num_patches, grid=grid, tokens=tokens, shuffle=shuffle)
        self.expand = (tokens or 1) if num_patches == 1 else 1  # tokens that one feature vector gives
        self.num_tokens = self.expand * self.body.num_tokens
        self.project = nn.Linear(self.body.dim, self.expand * lm_dim)
        self.norm = nn.LayerNorm(lm_dim) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Return visual tokens ``(B, Q, D_lm)`` of features ``(B, P, D_vis)``."""
        tokens = self.project(self.body(features))
        tokens = rearrange(tokens, "b p (k d) -> b (p k) d", k=self.expand)  # (B, Q, D_lm)
        return self.dropout(self.norm(tokens))
