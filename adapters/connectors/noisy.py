"""Add Gaussian noise to features in training, before another connector (CapDec, arXiv:2211.00575)."""

from __future__ import annotations

from typing import Any

import torch
from mllm.adapters.connectors.before import Before
from torch import Tensor
from torch.nn.functional import normalize

from mllm.registry import NonNegative


class Noisy(Before):
    """Features plus noise ``(B, P, D_vis)``, then another connector: what is trained on texts reads images, too.

    A dual encoder's images are not where their captions are; noise lets the connector read what is around a text. It is
    drawn anew in every step, from N(0, std^2) for each number, and only in training.

    Args:
        vis_dim: D_vis.
        lm_dim: D_lm.
        num_patches: P.
        grid: rows and columns of the patches, or None.
        std: of the noise: 0.126 is a variance of 0.016 (CapDec, ViECap, MacCap).
        normalize: scale features to length 1 before the noise, and after it; in answers, too.
        then: the next connector's ``type`` and arguments; None: linear.
    """

    def __init__(
        self,
        *,
        vis_dim: int,
        lm_dim: int | None,
        num_patches: int,
        grid: tuple[int, int] | None,
        std: NonNegative = 0.126,
        normalize: bool = True,
        then: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.std, self.normalize = std, normalize
        self.hand_to(then, vis_dim=vis_dim, lm_dim=lm_dim, num_patches=num_patches, grid=grid)

    def changed(self, features: Tensor) -> Tensor:
        """Return the features with noise; in evaluation without."""
        features = normalize(features, dim=-1) if self.normalize else features
        if not self.training or not self.std:
            return features
        noisy = features + self.std * torch.randn_like(features)
        return normalize(noisy, dim=-1) if self.normalize else noisy
