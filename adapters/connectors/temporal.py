"""Apply temporal attention over a video's frames, patch by patch, before another connector (SimVLG)."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from mllm.adapters.connectors.before import Before
from torch import Tensor, nn

from mllm.errors import MLLMError
from mllm.registry import Count


class Temporal(Before):
    """Features of T frames ``(B, T * P, D_vis)`` to those of one image ``(B, P, D_vis)``, then to another connector.

    The attention's output is added to the mean over the frames. The encoder must not pool the frames:
    ``{type: video, pool: none}``. As in SimVLG (arXiv:2310.03291), attention is over time alone, with width 256 and 8
    heads.

    Args:
        vis_dim: D_vis.
        lm_dim: D_lm.
        num_patches: T * P.
        grid: the frames' grids, stacked vertically, or None.
        frames: T.
        layers: transformer layers, pre-norm.
        dim: hidden size.
        heads: attention heads.
        then: the next connector's ``type`` and arguments; None: linear.

    Attributes:
        num_tokens: Q.

    Raises:
        MLLMError: the number of features is not a multiple of the number of frames.
    """

    def __init__(
        self,
        *,
        vis_dim: int,
        lm_dim: int | None,
        num_patches: int,
        grid: tuple[int, int] | None,
        frames: Count = 4,
        layers: Count = 1,
        dim: Count = 256,
        heads: Count = 8,
        then: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if frames < 1 or num_patches % frames or (grid and grid[0] % frames):
            raise MLLMError(
                f"connector.frames is {frames}, and the encoder's {num_patches} features cannot be divided into so "
                "many frames. Set it to encoder.frames, and set encoder.pool=none."
            )
        self.frames = frames
        self.enter, self.leave = nn.Linear(vis_dim, dim), nn.Linear(dim, vis_dim)
        self.times = nn.Parameter(0.02 * torch.randn(frames, dim))
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        inner = (grid[0] // frames, grid[1]) if grid else None
        self.hand_to(then, vis_dim=vis_dim, lm_dim=lm_dim, num_patches=num_patches // frames, grid=inner)
        self.token_grid = None

    def changed(self, features: Tensor) -> Tensor:
        """Return features ``(B, P, D_vis)`` pooled over the frames."""
        rows = rearrange(features, "b (t p) d -> (b p) t d", t=self.frames)
        attended = self.leave(self.layers(self.enter(rows) + self.times))  # ((B P), T, D_vis)
        return rearrange((rows + attended).mean(1), "(b p) d -> b p d", b=len(features))
