"""A small image decoder that is trained here: one vector to an image."""

from __future__ import annotations

import itertools
import math

import torch
from einops import rearrange
from torch import Tensor, nn

from mllm.errors import MLLMError

START = 4  # pixels a side, from which the image is grown


class Pixels(nn.Module):
    """Convolutions at growing sizes, the last doubling by pixel shuffle (arXiv:1609.05158).

    Args:
        lm_dim: width of the vectors.
        vis_dim: not used.
        side: pixels; a power of two, from 16.
        dim: channels at the smallest size; at each doubling they are fewer, down to 32.
        noise: length of what is added to vectors, which have length 1: in training, so that vectors which are a little
            off are understood; in use, by a seed, so that one vector gives several images.

    Raises:
        MLLMError: no width, or another side.
    """

    def __init__(
        self, *, lm_dim: int | None, vis_dim: int | None = None, side: int = 64, dim: int = 256, noise: float = 0.2
    ) -> None:
        super().__init__()
        doublings = round(math.log2(max(side, 1) / START))
        if lm_dim is None or START * 2**doublings != side or doublings < 2:
            raise MLLMError(
                f"The head pixels has side {side}, of vectors of {lm_dim}: expected 16, 32, 64, ... and lm."
            )
        self.side, self.noise = side, noise
        widths = [max(32, dim // 2**number) for number in range(doublings)]
        self.enter = nn.Sequential(nn.Linear(lm_dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim * START**2))
        self.grow = nn.Sequential(*(Doubling(*pair) for pair in itertools.pairwise(widths)))
        self.leave = nn.Sequential(
            nn.Conv2d(widths[-1], widths[-1], 3, padding=1),
            nn.GELU(),
            nn.Conv2d(widths[-1], 3 * 4, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def forward(self, vectors: Tensor, seeds: list[int] | None = None) -> Tensor:
        """Return images ``(N, 3, S, S)`` between 0 and 1 of vectors ``(N, D)``; with ``seeds``, disturbed by them."""
        vectors = nn.functional.normalize(vectors, dim=-1)
        if self.training:
            vectors = vectors + self._disturbance(torch.randn_like(vectors))
        elif seeds is not None:
            draws = [torch.randn(vectors.shape[1], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            vectors = vectors + self._disturbance(torch.stack(draws).to(vectors))
        start = rearrange(self.enter(vectors), "n (c h w) -> n c h w", h=START, w=START)
        return self.leave(self.grow(start)).sigmoid()

    def _disturbance(self, draw: Tensor) -> Tensor:
        return self.noise * draw / math.sqrt(draw.shape[-1])


class Doubling(nn.Module):
    """Twice the size, by repetition, then two convolutions of which the second adds to the first."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.norm = nn.GroupNorm(8, out)

    def forward(self, states: Tensor) -> Tensor:
        """Return ``(N, C', 2 H, 2 W)`` of ``(N, C, H, W)``."""
        states = self.first(nn.functional.interpolate(states, scale_factor=2.0))
        return states + self.second(nn.functional.gelu(self.norm(states)))
