"""Generate a small image from one vector, by a head that is fitted in closed form."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from mllm.errors import MLLMError
from mllm.registry import Count, NonNegative, Positive
from mllm.slots import Head


class Pixels(Head):
    """Random Fourier features of a vector, and a linear layer from them to principal components of images.

    A linear model of these features is a kernel machine with a Gaussian kernel (Rahimi and Recht 2007).

    Args:
        lm_dim: width D of the vectors.
        vis_dim: not used.
        side: height and width of the image in pixels.
        features: number of Fourier features.
        rank: number of principal components; the fit uses at most one fewer than there are images.
        sharpness: the inverse length scale of the kernel: normalized vectors further apart than 1 / sharpness differ.
        noise: norm of the Gaussian noise on the vectors: in the fit, for robustness to small deviations; when
            generating, by a seed, so that one vector gives several images.

    Raises:
        MLLMError: there is no sentence encoder.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(
        self,
        *,
        lm_dim: int | None,
        vis_dim: int | None = None,
        side: Count = 64,
        features: Count = 2048,
        rank: Count = 384,
        sharpness: Positive = 0.7,
        noise: NonNegative = 0.2,
    ) -> None:
        super().__init__()
        if lm_dim is None:
            raise MLLMError(
                "The head pixels decodes vectors of sentences, and the recipe has no lm. Add one: lm: {type: "
                "sentences, model: mllm/minilm}."
            )
        self.dim, self.side, self.noise = lm_dim, side, noise
        self.register_buffer("frequencies", sharpness * torch.randn(lm_dim, features))
        self.register_buffer("phases", 2 * math.pi * torch.rand(features))
        self.project, self.components = nn.Linear(features, rank), nn.Linear(rank, 3 * side * side)

    def body(self, vectors: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return features ``(N, F)`` of vectors ``(N, D)``; ``noise``: a standard normal sample of their shape."""
        vectors = nn.functional.normalize(vectors.to(self.frequencies.dtype), dim=-1)
        if noise is not None:
            vectors = vectors + self.noise * noise.to(vectors) / math.sqrt(self.dim)
        return (vectors @ self.frequencies + self.phases).cos()

    def forward(self, vectors: Tensor, seeds: list[int]) -> Tensor:
        """Return images ``(N, 3, S, S)`` between 0 and 1 of vectors ``(N, D)``, with noise from each one's seed."""
        noise = [torch.randn(self.dim, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        flat: Tensor = self.components(self.project(self.body(vectors, torch.stack(noise))))
        return rearrange(flat.clamp(0, 1), "n (c h w) -> n c h w", c=3, h=self.side)
