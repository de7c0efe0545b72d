"""Encode videos by encoding their frames with an image encoder and pooling the features; nothing here has weights.

A trained temporal transformer is a connector, ``{type: temporal, ...}``, because connectors are already initialized,
saved and checked; it reads the features of all frames, with ``pool: none``.
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
    """A video encoder: the features of a clip's frames from an image encoder, pooled over time.

    Args:
        of: the image encoder.
        frames: T, the number of frames sampled from a clip.
        pool: ``mean`` over the frames: P features; ``none``: T * P, frame by frame; ``merge``: at each patch position,
            the most similar features of neighbouring frames are averaged until ``keep`` frames remain.
        keep: the number of frames that remain with ``merge``.

    Raises:
        MLLMError: not exactly one image encoder, an unknown pooling, or an impossible ``keep``.
    """

    of: Any
    reads_images = False

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
                f"encoder.of has {len(of)} encoders, encoder.pool is {pool!r}, encoder.keep is {keep}: expected "
                f"one image encoder, pool mean, none or merge, and keep from 1 to frames={frames}. Correct it."
            )
        self.of, self.frames, self.pool, self.keep = of[0], frames, pool, keep
        remaining = {"mean": 1, "none": frames, "merge": keep}[pool]
        self.dim, self.num_patches = self.of.dim, remaining * self.of.num_patches
        grid = self.of.grid
        self.grid = (remaining * grid[0], grid[1]) if grid else None  # the frames' grids, one below the other
        self.cacheable = self.of.cacheable
        self.shape = (frames, *self.of.shape)

    @property
    def fingerprint(self) -> str:
        """Return the image encoder's fingerprint."""
        return str(self.of.fingerprint)

    def settings(self) -> dict[str, Any]:
        """Return the settings that, with the weights, determine the features."""
        settings = {"frames": self.frames, "pool": self.pool, "keep": self.keep}
        return {**settings, "of": [type(self.of).__name__, self.of.settings()]}

    def open(self, piece: Any) -> Clip:
        """Return a video as ``frames`` frames."""
        return open_clip(piece, self.frames)

    def key(self, source: ImageSource) -> str:
        """Return a hash of the video file."""
        return source.key()

    def preprocess(self, items: Sequence[Clip]) -> Tensor:
        """Return the frames' pixels ``(B, T, 3, H, W)``."""
        return torch.stack([self.of.preprocess(list(clip.frames)) for clip in items])

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features ``(B, P, D_vis)`` of the frames' pixels ``(B, T, 3, H, W)``."""
        features = rearrange(self.of(pixels.flatten(0, 1)), "(b t) p d -> b t p d", t=self.frames)
        if self.pool == "mean":
            return features.mean(1)
        if self.pool == "merge":
            features = merged(features, self.keep)
        return rearrange(features, "b t p d -> b (t p) d")


def merged(features: Tensor, keep: int) -> Tensor:
    """Merge neighbouring frames, separately at each patch, the most similar first (arXiv:2307.16449, algorithm 1).

    Args:
        features: ``(B, T, P, D)``.
        keep: the number of frames that remain.

    Returns:
        The means of the merged frames ``(B, keep, P, D)``.
    """
    sums = torch.cat(
        [features, torch.ones_like(features[..., :1])], dim=-1
    )  # the last column counts the frames in a sum
    while sums.shape[1] > keep:
        means = sums[..., :-1] / sums[..., -1:]
        best = cosine_similarity(means[:, :-1], means[:, 1:], dim=-1).argmax(1, keepdim=True)  # (B, 1, P)
        order = torch.arange(sums.shape[1] - 1, device=sums.device)[None, :, None]
        kept = (order + (order > best)).unsqueeze(-1).expand(-1, -1, -1, sums.shape[-1])  # all but the one after best
        second = sums.gather(1, (best + 1).unsqueeze(-1).expand(-1, -1, -1, sums.shape[-1]))
        sums = sums.gather(1, kept) + second * (order == best).unsqueeze(-1)
    return sums[..., :-1] / sums[..., -1:]
