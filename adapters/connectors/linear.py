"""Map features by one linear layer: per patch, per cell, or from one pooled vector to k tokens (LiMBeR, FROMAGe)."""

from __future__ import annotations

from einops import rearrange
from mllm.adapters.connectors.reduce import Reduce
from torch import Tensor, nn

from mllm.errors import MLLMError
from mllm.registry import Count, Dropout
from mllm.slots import Connector


class Linear(Connector):
    """Features ``(B, P, D_vis)`` to visual tokens ``(B, Q, D_lm)`` by one linear map.

    Args:
        vis_dim: D_vis.
        lm_dim: D_lm.
        num_patches: P.
        grid: rows and columns of the patches, or None.
        tokens: Q. None: one token per patch. A square number smaller than P: the grid is average-pooled to that many
            cells first. With a single feature vector (P = 1): the layer outputs all Q tokens at once.
        shuffle: s x s neighboring patches are concatenated first (pixel shuffle).
        norm: add a LayerNorm after the layer (MAGMA).
        dropout: after the layer (LiMBeR: 0.1).

    Attributes:
        num_tokens: Q.
        project: the linear layer to the language model's width.

    Raises:
        MLLMError: there is no language model, or the patches cannot be reduced to so many tokens.
    """

    def __init__(
        self,
        *,
        vis_dim: int,
        lm_dim: int | None,
        num_patches: int,
        grid: tuple[int, int] | None,
        tokens: Count | None = None,
        shuffle: Count | None = None,
        norm: bool = False,
        dropout: Dropout = 0.0,
    ) -> None:
        super().__init__()
        if lm_dim is None:
            raise MLLMError(
                "The connector linear needs a language model's width, and there is no lm. Add one: lm: {model: ...}."
            )
        self.body = Reduce(vis_dim=vis_dim, num_patches=num_patches, grid=grid, tokens=tokens, shuffle=shuffle)
        self.expand = (tokens or 1) if num_patches == 1 else 1  # tokens per feature vector
        self.num_tokens = self.expand * self.body.num_tokens
        self.token_grid = self.body.token_grid if self.expand == 1 else None
        self.project = nn.Linear(self.body.dim, self.expand * lm_dim)
        self.norm = nn.LayerNorm(lm_dim) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Return visual tokens ``(B, Q, D_lm)`` of features ``(B, P, D_vis)``."""
        tokens = self.project(self.body(features))
        tokens = rearrange(tokens, "b p (k d) -> b (p k) d", k=self.expand)  # (B, Q, D_lm)
        return self.dropout(self.norm(tokens))
