"""Reduce the number of patches before a connector, and project to the language model's width after it."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from mllm.errors import MLLMError
from mllm.registry import Count


class Reduce(nn.Module):
    """Features ``(B, P, D_vis)`` to fewer ``(B, Q, dim)``; without options, unchanged.

    Args:
        vis_dim: D_vis.
        num_patches: P.
        grid: rows and columns of the patches, or None.
        tokens: a square number smaller than P: the grid is average-pooled to that many cells.
        shuffle: a side s: s x s neighboring patches are concatenated to one vector (space to depth, as in Idefics3,
            arXiv:2408.12637), before the pooling.

    Attributes:
        dim: the output width.
        num_tokens: Q.
        token_grid: rows and columns of the Q vectors, or None.

    Raises:
        MLLMError: the patches form no grid, or one that cannot be reduced to so many tokens.
    """

    def __init__(
        self,
        *,
        vis_dim: int,
        num_patches: int,
        grid: tuple[int, int] | None,
        tokens: Count | None = None,
        shuffle: Count | None = None,
    ) -> None:
        super().__init__()
        self.grid, self.shuffle, self.dim, self.num_tokens = grid, shuffle, vis_dim, num_patches
        if shuffle is not None:
            self.grid = _shuffled(shuffle, num_patches, grid)
            self.dim, self.num_tokens = vis_dim * shuffle**2, self.grid[0] * self.grid[1]
        self.cells = _cells(tokens or self.num_tokens, self.num_tokens, self.grid)
        if self.cells is not None:
            self.num_tokens = self.cells[0] * self.cells[1]
        self.token_grid = self.cells or self.grid

    def forward(self, features: Tensor) -> Tensor:
        """Return features ``(B, Q, dim)``."""
        if self.shuffle is not None:
            assert self.grid is not None
            pattern = "b (h i w j) d -> b (h w) (i j d)"
            features = rearrange(features, pattern, h=self.grid[0], w=self.grid[1], i=self.shuffle, j=self.shuffle)
        if self.cells is None:
            return features
        assert self.grid is not None
        maps = rearrange(features, "b (h w) d -> b d h w", h=self.grid[0])
        return rearrange(adaptive_avg_pool2d(maps, self.cells), "b d h w -> b (h w) d")


def projection(dim: int, lm_dim: int | None) -> nn.Module:
    """Return the last linear layer of a connector; the identity without a language model."""
    return nn.Identity() if lm_dim is None else nn.Linear(dim, lm_dim)


def _shuffled(side: int, num_patches: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """Return the grid after a pixel shuffle."""
    if grid is None or side < 1 or grid[0] % side or grid[1] % side:
        where = f"a grid of {grid[0]} x {grid[1]} patches" if grid else f"{num_patches} features that form no grid"
        raise MLLMError(f"connector.shuffle is {side}, and {where} cannot be divided by it. Change or remove it.")
    return grid[0] // side, grid[1] // side


def _cells(tokens: int, num_patches: int, grid: tuple[int, int] | None) -> tuple[int, int] | None:
    """Return the rows and columns that the grid is pooled to, or None without pooling."""
    if num_patches in (1, tokens):
        return None
    side = round(tokens**0.5)
    if side * side != tokens or tokens > num_patches or grid is None:
        where = f"a grid of {grid[0]} x {grid[1]} patches" if grid else f"{num_patches} features that form no grid"
        raise MLLMError(
            f"connector.tokens is {tokens}, but {where} can be pooled only to a smaller square number "
            "(1, 4, 9, 16, ...). Change connector.tokens, or remove it for one token per patch."
        )
    return side, side
