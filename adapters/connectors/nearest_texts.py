"""Replace features by those of the nearest training captions, before another connector (DeCap, arXiv:2303.03032)."""

from __future__ import annotations

from typing import Any

import torch
from mllm.adapters.connectors.before import Before
from torch import Tensor
from torch.nn.functional import normalize

from mllm.errors import MLLMError
from mllm.registry import Count, Positive


class NearestTexts(Before):
    """Features ``(B, P, D_vis)`` to the weighted mean of the most similar texts' features, then another connector.

    DeCap's projection: the weights are the softmax of ``sharpness`` times the cosines, and the mean has length 1. So a
    connector that was trained on texts is given a mixture of texts in place of an image. The texts are captions of the
    training data, which are encoded when the first stage begins; their features are saved with the connector.

    Args:
        vis_dim: D_vis.
        lm_dim: D_lm.
        num_patches: P.
        grid: rows and columns of the patches, or None.
        texts: the most texts; of more captions, those of a random sample.
        sharpness: the factor on the cosines (DeCap: 100).
        always: in training, too; False: as in DeCap, features pass unchanged there, since they are those of texts.
        then: the next connector's ``type`` and arguments; None: linear.

    Attributes:
        places: the most texts.
        collected: how many there are.
    """

    memory: Tensor
    collected: Tensor

    def __init__(
        self,
        *,
        vis_dim: int,
        lm_dim: int | None,
        num_patches: int,
        grid: tuple[int, int] | None,
        texts: Count = 4096,
        sharpness: Positive = 100.0,
        always: bool = False,
        then: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.places, self.sharpness, self.always = texts, sharpness, always
        self.register_buffer("memory", torch.zeros(texts, vis_dim))
        self.register_buffer("collected", torch.zeros((), dtype=torch.long))
        self.hand_to(then, vis_dim=vis_dim, lm_dim=lm_dim, num_patches=num_patches, grid=grid)

    @torch.no_grad()
    def collect(self, features: Tensor) -> None:
        """Set the texts' features ``(N, P, D_vis)``, each the mean over P, scaled to length 1.

        Raises:
            MLLMError: there are none, or more than places.
        """
        if not 0 < len(features) <= self.places:
            raise MLLMError(
                f"The connector nearest-texts has places for {self.places} texts, and was given {len(features)}. Set "
                f"connector.texts={max(1, len(features))}, and give a source of captions."
            )
        self.memory[: len(features)] = normalize(features.to(self.memory).mean(1), dim=-1)
        self.collected.fill_(len(features))

    def changed(self, features: Tensor) -> Tensor:
        """Return the weighted means ``(B, P, D_vis)``; the features, while there are no texts."""
        if self.training and not self.always:
            return features
        memory = self.memory.to(features.dtype)
        empty = torch.arange(self.places, device=memory.device) >= self.collected
        cosines = normalize(features, dim=-1) @ memory.T  # (B, P, S)
        weights = (self.sharpness * cosines).masked_fill(empty, torch.finfo(cosines.dtype).min).softmax(-1)
        return torch.where(self.collected > 0, normalize(weights @ memory, dim=-1), features)
