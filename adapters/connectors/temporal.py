"""A transformer over a video's frames, place by place, before any other connector (SimVLG's temporal attention)."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from mllm.errors import MLLMError
from mllm.registry import lookup, made
from mllm.slots import Connector


class Temporal(Connector):
    """Features of T frames ``(B, T * P, D_vis)`` to those of one picture ``(B, P, D_vis)``, and on by a connector.

    What the frames of a place learn of one another is added to their mean. The encoder leaves the frames apart:
    ``{type: video, pool: none}``. As in SimVLG (arXiv:2310.03291) attention is over time alone, 256 wide, by 8 heads.

    Args:
        vis_dim: D_vis.
        lm_dim: D_lm.
        num_patches: T * P.
        grid: the frames' grids, one below the other, or None.
        frames: T.
        layers: of the transformer, which is pre-norm.
        dim: width inside.
        heads: of the attention.
        then: the connector behind it, and its arguments.

    Attributes:
        num_tokens: Q.
        project: the last linear map of the connector behind it.

    Raises:
        MLLMError: the features are not those of so many frames.
    """

    def __init__(
        self,
        *,
        vis_dim: int,
        lm_dim: int | None,
        num_patches: int,
        grid: tuple[int, int] | None,
        frames: int = 4,
        layers: int = 1,
        dim: int = 256,
        heads: int = 8,
        then: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if frames < 1 or num_patches % frames or (grid and grid[0] % frames):
            raise MLLMError(
                f"connector.frames is {frames}, and the encoder's {num_patches} features are not those of so many "
                "frames. Set it to encoder.frames, and encoder.pool=none."
            )
        self.frames = frames
        self.enter, self.leave = nn.Linear(vis_dim, dim), nn.Linear(dim, vis_dim)
        self.times = nn.Parameter(0.02 * torch.randn(frames, dim))
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        options = dict(then or {"type": "linear"})
        kind = options.pop("type", "linear")
        widths = {"vis_dim": vis_dim, "lm_dim": lm_dim, "num_patches": num_patches // frames}
        inner = (grid[0] // frames, grid[1]) if grid else None
        self.then: Any = made(lookup("connectors", kind), f"connector {kind}", **widths, grid=inner, **options)
        self.num_tokens = self.then.num_tokens

    def linear(self) -> nn.Linear | None:
        """Return the linear map of the connector behind."""
        linear: nn.Linear | None = self.then.linear()
        return linear

    def output(self) -> nn.Module | None:
        """Return the last module of the connector behind."""
        last: nn.Module | None = self.then.output()
        return last

    def body(self, features: Tensor) -> Tensor:
        """Return what that linear map is applied to."""
        inner: Tensor = self.then.body(self.pooled(features))
        return inner

    def pooled(self, features: Tensor) -> Tensor:
        """Return features of one picture ``(B, P, D_vis)``."""
        rows = rearrange(features, "b (t p) d -> (b p) t d", t=self.frames)
        learnt = self.leave(self.layers(self.enter(rows) + self.times))  # ((B P), T, D_vis)
        return rearrange((rows + learnt).mean(1), "(b p) d -> b p d", b=len(features))

    def forward(self, features: Tensor) -> Tensor:
        """Return visual tokens ``(B, Q, D_lm)`` of features ``(B, T * P, D_vis)``."""
        return self.then(self.pooled(features))
