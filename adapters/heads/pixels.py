"""A small image decoder that is fitted here, in closed form: one vector to an image."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from mllm.errors import MLLMError
from mllm.slots import Head


class Pixels(Head):
    """Random Fourier features of a vector, and a linear map from them to the main components of pictures.

    A linear map of these features is a kernel machine with a Gaussian kernel (Rahimi and Recht 2007).

    Args:
        lm_dim: width D of the vectors.
        vis_dim: not used.
        side: pixels.
        features: number of Fourier features.
        rank: components; the fit takes no more than there are pictures.
        sharpness: of the kernel: vectors of length 1 that are further apart than 1 / sharpness are told apart.
        noise: length of what is added to vectors: in the fit, so that vectors which are a little off are understood; in
            use, by a seed, so that one vector gives several images.

    Raises:
        MLLMError: no width.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(
        self,
        *,
        lm_dim: int | None,
        vis_dim: int | None = None,
        side: int = 64,
        features: int = 2048,
        rank: int = 384,
        sharpness: float = 0.7,
        noise: float = 0.2,
    ) -> None:
        super().__init__()
        if lm_dim is None:
            raise MLLMError("The head pixels draws vectors of sentences, and the recipe names no lm.")
        self.dim, self.side, self.noise = lm_dim, side, noise
        self.register_buffer("frequencies", sharpness * torch.randn(lm_dim, features))
        self.register_buffer("phases", 2 * math.pi * torch.rand(features))
        self.project, self.components = nn.Linear(features, rank), nn.Linear(rank, 3 * side * side)

    def body(self, vectors: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return features ``(N, F)`` of vectors ``(N, D)``; ``noise``: a normal draw of their shape, to be added."""
        vectors = nn.functional.normalize(vectors, dim=-1)
        if noise is not None:
            vectors = vectors + self.noise * noise / math.sqrt(self.dim)
        return (vectors @ self.frequencies + self.phases).cos()

    def forward(self, vectors: Tensor, seeds: list[int]) -> Tensor:
        """Return images ``(N, 3, S, S)`` between 0 and 1 of vectors ``(N, D)``, each disturbed by its seed."""
        draws = [torch.randn(self.dim, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        flat: Tensor = self.components(self.project(self.body(vectors, torch.stack(draws).to(vectors))))
        return rearrange(flat.clamp(0, 1), "n (c h w) -> n c h w", c=3, h=self.side)
