"""A retrieval head (FROMAGe): the state at a new token and an image's feature, brought into one space."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mllm.capabilities import ImageTokenHead
from mllm.errors import MLLMError


class Retrieval(ImageTokenHead):
    """Two linear maps into a shared space, and how sharply its cosines are read (arXiv:2301.13823).

    Args:
        lm_dim: D_lm.
        vis_dim: D_vis.
        dim: width D of the shared space.
        token: the new token that stands for an image.

    Attributes:
        scale: logarithm of what cosines are multiplied by before the softmax; trained, from ln(1/0.07).

    Raises:
        MLLMError: no language model, or no encoder.
    """

    def __init__(self, *, lm_dim: int | None, vis_dim: int | None, dim: int = 256, token: str = "[RET]") -> None:
        super().__init__()
        if lm_dim is None or vis_dim is None:
            raise MLLMError("The head retrieval joins a language model and an encoder: give lm and encoder.")
        self.dim, self.tokens = dim, (token,)
        self.text, self.image = nn.Linear(lm_dim, dim), nn.Linear(vis_dim, dim)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def of_states(self, states: Tensor) -> Tensor:
        """Return vectors ``(N, D)`` of length 1 of last-layer states ``(N, D_lm)`` at the token."""
        return normalize(self.text(states.to(self.text.weight.dtype)), dim=-1)

    def of_features(self, features: Tensor) -> Tensor:
        """Return vectors ``(I, D)`` of length 1 of features ``(I, P, D_vis)``: of their mean over patches."""
        return normalize(self.image(features.to(self.image.weight.dtype).mean(1)), dim=-1)
