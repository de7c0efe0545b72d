"""Map the state at a new token and an image's features into one space, to retrieve images (FROMAGe)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mllm.capabilities import ImageTokenHead
from mllm.errors import MLLMError
from mllm.registry import Count


class RetrievalMaps(ImageTokenHead):
    """Two linear layers into a shared space, and a learned scale of the cosines (arXiv:2301.13823).

    Args:
        lm_dim: D_lm.
        vis_dim: D_vis.
        dim: width D of the shared space.
        token: the new token that stands for an image.

    Attributes:
        scale: the logarithm of the factor on the cosines before the softmax; trained, starting at ln(1/0.07).

    Raises:
        MLLMError: there is no language model, or no encoder.
    """

    def __init__(self, *, lm_dim: int | None, vis_dim: int | None, dim: Count = 256, token: str = "[RET]") -> None:
        super().__init__()
        if lm_dim is None or vis_dim is None:
            raise MLLMError(
                "The head retrieval needs a language model and an encoder, and one is missing: give lm and encoder."
            )
        self.dim, self.tokens = dim, (token,)
        self.text, self.image = nn.Linear(lm_dim, dim), nn.Linear(vis_dim, dim)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def of_states(self, states: Tensor) -> Tensor:
        """Return vectors ``(N, D)`` of length 1 of last-layer states ``(N, D_lm)`` at the token."""
        return normalize(self.text(states.to(self.text.weight.dtype)), dim=-1)

    def of_features(self, features: Tensor) -> Tensor:
        """Return vectors ``(I, D)`` of length 1 of the mean over patches of features ``(I, P, D_vis)``."""
        return normalize(self.image(features.to(self.image.weight.dtype).mean(1)), dim=-1)
