"""Map features to learned latents by a perceiver resampler (Flamingo, arXiv:2204.14198)."""

from __future__ import annotations

import torch
from mllm.adapters.connectors.reduce import projection
from torch import Tensor, nn
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler

from mllm.registry import Count
from mllm.slots import Connector


class Resampler(Connector):
    """Features ``(B, P, D_vis)`` to Q visual tokens, by `transformers`' resampler of Idefics2 (arXiv:2405.02246).

    Args:
        vis_dim: D_vis.
        lm_dim: D_lm; None: there is no language model, and no projection to it.
        num_patches: P.
        grid: not used.
        tokens: Q, the number of latents.
        depth: number of layers.
        heads: attention heads.
        head_dim: width of a head; None: D_vis / heads.
        kv_heads: key-value heads; None: as many as ``heads``.

    Attributes:
        num_tokens: Q.
        project: the linear layer to the language model's width.
    """

    reads_whole = True

    def __init__(
        self,
        *,
        vis_dim: int,
        lm_dim: int | None,
        num_patches: int,
        grid: tuple[int, int] | None,
        tokens: Count = 64,
        depth: Count = 3,
        heads: Count = 16,
        head_dim: Count | None = None,
        kv_heads: Count | None = None,
    ) -> None:
        super().__init__()
        self.num_tokens = tokens
        config = Idefics2PerceiverConfig(
            hidden_size=vis_dim,
            resampler_n_latents=tokens,
            resampler_depth=depth,
            resampler_n_heads=heads,
            resampler_head_dim=head_dim or max(1, vis_dim // heads),
            num_key_value_heads=kv_heads or heads,
        )
        self.resampler = Idefics2PerceiverResampler(config)
        nn.init.normal_(self.resampler.latents, std=0.02)  # equal latents would stay equal in training
        self.project = projection(vis_dim, lm_dim)

    def body(self, features: Tensor) -> Tensor:
        """Return the latents' states ``(B, Q, D_vis)`` after attention to the features."""
        mask = self.mask_of(features)
        mask = torch.ones(features.shape[:2], device=features.device) if mask is None else mask
        latents: Tensor = self.resampler(features, mask.long())
        return latents

    def forward(self, features: Tensor) -> Tensor:
        """Return visual tokens ``(B, Q, D_lm)`` of features ``(B, P, D_vis)``."""
        return self.project(self.body(features))
