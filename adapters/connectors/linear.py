"""One linear map: per patch, per pooled cell, or from one pooled vector to k tokens (Frozen, LiMBeR, FROMAGe)."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from mllm.errors import MLLMError


class Linear(nn.Module):
    """Features ``(B, P, D_vis)`` to visual tokens ``(B, Q, D_lm)`` by one linear map.

    Args:
        vis_dim: D_vis.
        lm_dim: D_lm.
        num_patches: P.
        grid: rows and columns of the patches, or None.
        tokens: Q. None: one token a patch. A square number smaller than P: the grid is averaged to that many cells
            first. With a single feature vector (P = 1): the map gives all Q tokens at once.
        norm: a LayerNorm after the map (MAGMA).
        dropout: after the map (LiMBeR: 0.1).

    Attributes:
        num_tokens: Q.
        project: the linear map to the language model's width.

    Raises:
        MLLMError: the patches cannot be averaged to ``tokens`` cells.
    """

    def __init__(
        self,
        *,
        vis_dim: int,
        lm_dim: int,
        num_patches: int,
        grid: tuple[int, int] | None,
        tokens: int | None = None,
        norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.grid, self.num_tokens = grid, tokens or num_patches
        self.expand = self.num_tokens if num_patches == 1 else 1  # tokens that one feature vector gives
        self.cells = _cells(self.num_tokens, num_patches, grid)
        self.project = nn.Linear(vis_dim, self.expand * lm_dim)
        self.norm = nn.LayerNorm(lm_dim) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def body(self, features: Tensor) -> Tensor:
        """Return what the linear map is applied to: features ``(B, Q, D_vis)``, averaged to cells."""
        if self.cells is None:
            return features
        assert self.grid is not None
        maps = rearrange(features, "b (h w) d -> b d h w", h=self.grid[0])
        return rearrange(adaptive_avg_pool2d(maps, self.cells), "b d h w -> b (h w) d")

    def forward(self, features: Tensor) -> Tensor:
        """Return visual tokens ``(B, Q, D_lm)`` of features ``(B, P, D_vis)``."""
        tokens = self.project(self.body(features))
        tokens = rearrange(tokens, "b p (k d) -> b (p k) d", k=self.expand)  # (B, Q, D_lm)
        return self.dropout(self.norm(tokens))


def _cells(tokens: int, num_patches: int, grid: tuple[int, int] | None) -> tuple[int, int] | None:
    """Return the rows and columns the grid is averaged to, or None where nothing is averaged."""
    if num_patches in (1, tokens):
        return None
    side = round(tokens**0.5)
    if side * side != tokens or tokens > num_patches or grid is None:
        where = f"a grid of {grid[0]} x {grid[1]} patches" if grid else f"{num_patches} features that form no grid"
        raise MLLMError(
            f"connector.tokens is {tokens}, but {where} can be averaged only to a smaller square number "
            "(1, 4, 9, 16, ...). Change connector.tokens, or leave it out for one token a patch."
        )
    return side, side
