"""Video: frames through an image encoder, then pooled. Everything here is without weights of its own.

Notable: what is trained over frames (a temporal transformer) is a connector, ``{type: temporal, ...}``, since there
trained modules are drawn, saved and checked already; it reads the frames that ``pool: none`` leaves apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from mllm.errors import MLLMError
from mllm.media.images import ImageSource
from mllm.media.videos import Clip, open_clip
from mllm.slots import Encoder


class Video(Encoder):
    """Clips to features by an image encoder.

    Args:
        of: the image encoder.
        frames: T, that a clip is looked at in.
        pool: ``mean`` over the frames: P features; ``none``: T * P, frame after frame; ``merge``: the features of a
            place that are most alike in neighbouring frames become their mean, until ``keep`` frames are left.
        keep: frames left by ``merge``.

    Raises:
        MLLMError: not one image encoder, or no frame left.
    """

    of: Any

    def __init__(
        self,
        *,
        of: Sequence[nn.Module],
        frames: int = 4,
        pool: Literal["mean", "none", "merge"] = "mean",
        keep: int = 1,
    ) -> None:
        super().__init__()
        if len(of) != 1 or pool not in ("mean", "none", "merge") or not 1 <= keep <= frames:
            raise MLLMError(
                f"A video encoder has one image encoder (encoder.of: {len(of)}), pool mean, none or merge ({pool!r}), "
                f"and keeps from 1 to frames={frames} of the frames ({keep})."
            )
        self.of, self.frames, self.pool, self.keep = of[0], frames, pool, keep
        left = {"mean": 1, "none": frames, "merge": keep}[pool]
        self.dim, self.num_patches = self.of.dim, left * self.of.num_patches
        grid = self.of.grid
        self.grid = (left * grid[0], grid[1]) if grid else None  # the frames, one below the other
        self.cacheable = self.of.cacheable
        self.shape = (frames, *self.of.shape)

    @property
    def fingerprint(self) -> str:
        """Return the image encoder's."""
        return str(self.of.fingerprint)

    def settings(self) -> dict[str, Any]:
        """Return what, beside the weights, decides the features."""
        own = {"frames": self.frames, "pool": self.pool, "keep": self.keep}
        return {**own, "of": [type(self.of).__name__, self.of.settings()]}

    def open(self, piece: Any) -> Clip:
        """Return a video as so many frames."""
        return open_clip(piece, self.frames)

    def key(self, source: ImageSource) -> str:
        """Return a hash of the file."""
        return source.key()

    def preprocess(self, items: Sequence[Clip]) -> Tensor:
        """Return the frames' pixels ``(B, T, 3, H, W)``."""
        return torch.stack([self.of.preprocess(list(clip.frames)) for clip in items])

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features ``(B, P, D_vis)``."""
        features = rearrange(self.of(pixels.flatten(0, 1)), "(b t) p d -> b t p d", t=self.frames)
        if self.pool == "mean":
            return features.mean(1)
        if self.pool == "merge":
            features = merged(features, self.keep)
        return rearrange(features, "b t p d -> b (t p) d")


def merged(features: Tensor, keep: int) -> Tensor:
    """Join neighbouring frames, place by place, the most alike first (arXiv:2307.16449, algorithm 1).

    Args:
        features: ``(B, T, P, D)``.
        keep: frames that are left.

    Returns:
        Means over the frames that were joined ``(B, keep, P, D)``.
    """
    sums = torch.cat([features, torch.ones_like(features[..., :1])], dim=-1)  # and how many frames were added up
    while sums.shape[1] > keep:
        means = sums[..., :-1] / sums[..., -1:]
        best = cosine_similarity(means[:, :-1], means[:, 1:], dim=-1).argmax(1, keepdim=True)  # (B, 1, P)
        order = torch.arange(sums.shape[1] - 1, device=sums.device)[None, :, None]
        place = (order + (order > best)).unsqueeze(-1).expand(-1, -1, -1, sums.shape[-1])  # all but the one behind best
        second = sums.gather(1, (best + 1).unsqueeze(-1).expand(-1, -1, -1, sums.shape[-1]))
        sums = sums.gather(1, place) + second * (order == best).unsqueeze(-1)
    return sums[..., :-1] / sums[..., -1:]
