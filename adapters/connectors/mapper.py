"""Map features to learned queries by a small transformer (MAPL, arXiv:2210.07179; ClipCap, arXiv:2111.09734)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from einops import rearrange, repeat
from mllm.adapters.connectors.reduce import projection
from torch import Tensor, nn

from mllm.errors import MLLMError
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
        attention: ``joint``: learned queries and features are one sequence (MAPL); ``cross``: the queries attend to
            each other and to the features, which are not changed by the layers. This takes fewer FLOPs.
        positions: add learned positions to the features.
        norm: normalize the features first, each by a LayerNorm.

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
        attention: Literal["joint", "cross"] = "joint",
        positions: bool = False,
        norm: bool = False,
    ) -> None:
        super().__init__()
        if attention not in ("joint", "cross"):
            raise MLLMError(f"connector.attention is {attention!r}: expected joint or cross.")
        self.num_tokens, self.expand, self.attention = tokens, expand, attention
        self.reads_whole = not positions  # which are those of a fixed number of features
        self.normalize = nn.LayerNorm(vis_dim) if norm else nn.Identity()
        self.enter = nn.Linear(vis_dim, expand * dim)
        self.queries = nn.Parameter(torch.randn(tokens, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(num_patches * expand, dim)) if positions else 0.0
        options: dict[str, Any] = {"dropout": dropout, "batch_first": True, "norm_first": True}
        if attention == "joint":
            layer = nn.TransformerEncoderLayer(dim, heads, ffn, **options)
            self.encoder: nn.Module = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        else:
            block = nn.TransformerDecoderLayer(dim, heads, ffn, **options)
            self.encoder = nn.TransformerDecoder(block, layers, norm=nn.LayerNorm(dim))
        self.project = projection(dim, lm_dim)

    def body(self, features: Tensor) -> Tensor:
        """Return the transformer's outputs ``(B, Q, dim)`` at the queries."""
        inputs = rearrange(self.enter(self.normalize(features)), "b p (k d) -> b (p k) d", k=self.expand)
        inputs = inputs + self.positions
        queries = repeat(self.queries, "q d -> b q d", b=len(features))
        mask = self.mask_of(features)
        padding = None if mask is None else ~mask.repeat_interleave(self.expand, dim=1)
        if self.attention == "cross":
            attended: Tensor = self.encoder(queries, inputs, memory_key_padding_mask=padding)
            return attended
        if padding is not None:
            padding = torch.cat([padding, padding.new_zeros(queries.shape[:2])], dim=1)
        states: Tensor = self.encoder(torch.cat([inputs, queries], dim=1), src_key_padding_mask=padding)
        return states[:, -self.num_tokens :]

    def forward(self, features: Tensor) -> Tensor:
        """Return visual tokens ``(B, Q, D_lm)`` of features ``(B, P, D_vis)``."""
        return self.project(self.body(features))
