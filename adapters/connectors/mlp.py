"""Map every patch by a multi-layer perceptron (LLaVA-1.5, arXiv:2310.03744: two layers with GELU)."""

from __future__ import annotations

from itertools import pairwise

from mllm.adapters.connectors.reduce import Reduce
from torch import Tensor, nn

from mllm.errors import MLLMError
from mllm.registry import Count
from mllm.slots import Connector


class MLP(Connector):
    """Features ``(B, P, D_vis)`` to visual tokens ``(B, Q, D_lm)``, each patch or cell independently.

    Args:
        vis_dim: D_vis.
        lm_dim: D_lm.
        num_patches: P.
        grid: rows and columns of the patches, or None.
        depth: number of linear layers.
        hidden: width between them; None: D_lm.
        tokens: a square number: the grid is average-pooled to that many cells first.
        shuffle: s x s neighboring patches are concatenated first (pixel shuffle).
        norm: add a LayerNorm after every linear layer (Yi-VL).
        input_norm: add a LayerNorm before the first linear layer (InternVL).

    Attributes:
        num_tokens: Q.
        body: all but the last linear layer.
        project: the last linear layer.

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
        depth: Count = 2,
        hidden: Count | None = None,
        tokens: Count | None = None,
        shuffle: Count | None = None,
        norm: bool = False,
        input_norm: bool = False,
    ) -> None:
        super().__init__()
        if lm_dim is None:
            raise MLLMError(
                "The connector mlp needs a language model's width, and there is no lm. Add one: lm: {model: ...}."
            )
        reduce = Reduce(vis_dim=vis_dim, num_patches=num_patches, grid=grid, tokens=tokens, shuffle=shuffle)
        widths = [reduce.dim, *[hidden or lm_dim] * (depth - 1)]
        layers: list[nn.Module] = [reduce, *([nn.LayerNorm(reduce.dim)] if input_norm else [])]
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), *([nn.LayerNorm(after)] if norm else []), nn.GELU()]
        self.num_tokens, self.token_grid = reduce.num_tokens, reduce.token_grid
        self.body = nn.Sequential(*layers)
        self.project = nn.Linear(widths[-1], lm_dim)
        self.norm = nn.LayerNorm(lm_dim) if norm else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """Return visual tokens ``(B, Q, D_lm)`` of features ``(B, P, D_vis)``."""
        return self.norm(self.project(self.body(features)))
