"""Map features to learned queries by a small transformer (MAPL, arXiv:2210.07179; ClipCap, arXiv:2111.09734)."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from mllm.adapters.connectors.reduce import projection
from torch import Tensor, nn

from mllm.registry import Count, Dropout
from mllm.slots import Connector


class Mapper(Connector):
    """Features ``(B, P, D_vis)`` to Q visual tokens: learned queries after the features in a transformer encoder.

    Args:
        vis_dim: D_vis.
        lm_dim: D_lm; None: there is no language model, and no projection to it.
        num_patches: P.
        grid: not used.
        tokens: Q, the number of learned queries.
        dim: hidden size (MAPL: 256).
        layers: transformer layers, pre-norm with ReLU.
        heads: attention heads.
        ffn: width of the feed-forward layers.
        expand: vectors that each feature is expanded to first (ClipCap: 10, from one pooled vector).
        dropout: in the transformer.

    Attributes:
        num_tokens: Q.
        project: the linear layer to the language model's width.
    """

    def __init__(
        self,
        *,
        vis_dim: int,
        lm_dim: int | None,
        num_patches: int,
        grid: tuple[int, int] | None,
        tokens: Count = 32,
        dim: Count = 256,
        layers: Count = 4,
        heads: Count = 8,
        ffn: Count = 512,
        expand: Count = 1,
        dropout: Dropout = 0.0,
    ) -> None:
        super().__init__()
        self.num_tokens, self.expand = tokens, expand
        self.enter = nn.Linear(vis_dim, expand * dim)
        self.queries = nn.Parameter(torch.randn(tokens, dim))
        layer = nn.TransformerEncoderLayer(dim, heads, ffn, dropout, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.project = projection(dim, lm_dim)

    def body(self, features: Tensor) -> Tensor:
        """Return the transformer's outputs ``(B, Q, dim)`` at the queries."""
        inputs = rearrange(self.enter(features), "b p (k d) -> b (p k) d", k=self.expand)
        queries = repeat(self.queries, "q d -> b q d", b=len(features))
        states: Tensor = self.encoder(torch.cat([inputs, queries], dim=1))
        return states[:, -self.num_tokens :]

    def forward(self, features: Tensor) -> Tensor:
        """Return visual tokens ``(B, Q, D_lm)`` of features ``(B, P, D_vis)``."""
        return self.project(self.body(features))
