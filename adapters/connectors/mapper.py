"""A small transformer that reads features into learned vectors (MAPL, arXiv:2210.07179; ClipCap, arXiv:2111.09734)."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from mllm.adapters.connectors.reduce import projection
from torch import Tensor, nn

from mllm.slots import Connector


class Mapper(Connector):
    """Features ``(B, P, D_vis)`` to Q visual tokens: learned vectors behind the features, through a transformer.

    Args:
        vis_dim: D_vis.
        lm_dim: D_lm; None: there is no language model, and no map to it.
        num_patches: P.
        grid: not used: a sequence will do.
        tokens: Q, the learned vectors.
        dim: width inside (MAPL: 256).
        layers: of the encoder, which is pre-norm with ReLU.
        heads: of its attention.
        ffn: width of its feed-forward layers.
        expand: vectors that each feature becomes first (ClipCap: 10, from one pooled vector).
        dropout: inside.

    Attributes:
        num_tokens: Q.
        project: the linear map to the language model's width.
    """

    def __init__(
        self,
        *,
        vis_dim: int,
        lm_dim: int | None,
        num_patches: int,
        grid: tuple[int, int] | None,
        tokens: int = 32,
        dim: int = 256,
        layers: int = 4,
        heads: int = 8,
        ffn: int = 512,
        expand: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_tokens, self.expand = tokens, expand
        self.enter = nn.Linear(vis_dim, expand * dim)
        self.queries = nn.Parameter(torch.randn(tokens, dim))
        layer = nn.TransformerEncoderLayer(dim, heads, ffn, dropout, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.project = projection(dim, lm_dim)

    def body(self, features: Tensor) -> Tensor:
        """Return the learned vectors after reading the features: ``(B, Q, dim)``."""
        entered = rearrange(self.enter(features), "b p (k d) -> b (p k) d", k=self.expand)
        queries = repeat(self.queries, "q d -> b q d", b=len(features))
        read: Tensor = self.encoder(torch.cat([entered, queries], dim=1))
        return read[:, -self.num_tokens :]

    def forward(self, features: Tensor) -> Tensor:
        """Return visual tokens ``(B, Q, D_lm)`` of features ``(B, P, D_vis)``."""
        return self.project(self.body(features))
