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
from mllm.media.sampling import Sampling, middle
from mllm.media.videos import Clip, length_of, open_clip
from mllm.registry import Count, Positive
from mllm.slots import Encoder

MOST = 64  # frames of a video that is sampled at a rate


class Video(Encoder):
    """A video encoder: the features of a clip's frames from an image encoder, pooled over time.

    By default every video is sampled as ``frames`` frames. With ``fps`` or ``most`` the number of frames follows from
    the video's length (`mllm.media.sampling.Sampling`), and the frames are cut into segments of ``frames`` frames, each
    of which is pooled by itself and takes the connector's number of tokens.

    Args:
        of: the image encoder.
        frames: T, the number of frames sampled from a clip, or of a segment; None: 4, or 1 of a segment.
        pool: ``mean`` over the frames: P features; ``slope``: P, how the features change from frame to frame;
            ``none``: T * P, frame by frame; ``merge``: at each patch position, the most similar features of
            neighbouring frames are averaged until ``keep`` frames remain.
        keep: the number of frames that remain with ``merge``.
        fps: frames that are sampled per second; None: as many for every video, or ``most``.
        least: with ``fps`` or ``most``: the least number of frames of a video.
        most: the most frames of a video; None: 64, where ``fps`` is given.
        max_tokens: the most visual tokens of a video; None: no limit.

    Raises:
        MLLMError: not exactly one image encoder, an unknown pooling, an impossible ``keep``, or limits that contradict
            each other.
    """

    of: Any
    reads_images = False
    reads_videos = True
    tiling: Sampling | None = None

    def __init__(
        self,
        *,
        of: Sequence[nn.Module],
        frames: Count | None = None,
        pool: Literal["mean", "slope", "none", "merge"] = "mean",
        keep: int = 1,
        fps: Positive | None = None,
        least: Count = 1,
        most: Count | None = None,
        max_tokens: Count | None = None,
    ) -> None:
        super().__init__()
        varying = fps is not None or most is not None
        frames = (1 if varying else 4) if frames is None else frames
        remaining = {"mean": 1, "slope": 1, "none": frames, "merge": keep}
        if len(of) != 1 or pool not in remaining or not 1 <= keep <= frames:
            raise MLLMError(
                f"encoder.of has {len(of)} encoders, encoder.pool is {pool!r}, encoder.keep is {keep}: expected "
                f"one image encoder, pool mean, slope, none or merge, and keep from 1 to frames={frames}. Correct it."
            )
        self.of, self.frames, self.pool, self.keep = of[0], frames, pool, keep
        self.dim, self.num_patches = self.of.dim, remaining[pool] * self.of.num_patches
        grid = self.of.grid
        self.grid = (remaining[pool] * grid[0], grid[1]) if grid else None  # the frames' grids, one below the other
        self.cacheable = self.of.cacheable
        self.shape = (frames, *self.of.shape)
        if varying:
            self.tiling = _sampling(frames, fps, least, most or max(MOST, frames), max_tokens)
        elif least != 1 or max_tokens is not None:
            raise MLLMError(
                f"encoder.least and encoder.max_tokens limit a varying number of frames, and every video has {frames}. "
                "Set encoder.fps or encoder.most, too."
            )

    @property
    def fingerprint(self) -> str:
        """Return the image encoder's fingerprint."""
        return str(self.of.fingerprint)

    def settings(self) -> dict[str, Any]:
        """Return the settings that, with the weights, determine the features."""
        settings = {"frames": self.frames, "pool": self.pool, "keep": self.keep}
        return {**settings, "of": [type(self.of).__name__, self.of.settings()]}

    def open(self, piece: Any) -> Clip:
        """Return a video as its sampled frames."""
        return open_clip(piece, self.frames) if self.tiling is None else self.tiling.open(piece)

    def key(self, source: ImageSource) -> str:
        """Return a hash of the video file."""
        return source.key()

    def pixels(self, piece: Any) -> int:
        """Return the number of pixels of the frames that are sampled, and of the one that is decoded."""
        if self.tiling is not None and self.tiling.is_given(piece):
            return super().pixels(piece)
        frames = self.frames if self.tiling is None else self.tiling.of(piece).tiles * self.frames
        return (frames + 1) * length_of(piece).side

    def preprocess(self, items: Sequence[Clip]) -> Tensor:
        """Return the frames' pixels ``(B, T, 3, H, W)``; of a longer clip those of its middle segment."""
        return torch.stack([self.of.preprocess(list(clip.frames)) for clip in middle(items, self.frames)])

    def prepared(self, items: Sequence[Clip]) -> Tensor:
        """Return the frames' pixels, in as few bytes as possible."""
        return torch.stack([self.of.prepared(list(clip.frames)) for clip in middle(items, self.frames)])

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features ``(B, P, D_vis)`` of the frames' pixels ``(B, T, 3, H, W)``."""
        features = rearrange(self.of(pixels.flatten(0, 1)), "(b t) p d -> b t p d", t=self.frames)
        if self.pool == "mean":
            return features.mean(1)
        if self.pool == "slope":
            return slopes(features)
        if self.pool == "merge":
            features = merged(features, self.keep)
        return rearrange(features, "b t p d -> b (t p) d")


def _sampling(frames: int, fps: float | None, least: int, most: int, max_tokens: int | None) -> Sampling:
    """Return how videos are sampled.

    Raises:
        MLLMError: the limits contradict each other.
    """
    if not least <= most or frames > most:
        raise MLLMError(
            f"encoder.least is {least}, encoder.most is {most} and a segment has frames={frames}: expected neither to "
            "be more than encoder.most. Correct them."
        )
    return Sampling(frames, fps, least, most, max_tokens)


def slopes(features: Tensor) -> Tensor:
    """Return the slopes ``(B, P, D)`` over time of features ``(B, T, P, D)``, by least squares; 0 of one frame.

    They are per half of the clip's length and not per frame, so that they are as large in a longer clip.
    """
    times = torch.linspace(-1, 1, features.shape[1], device=features.device, dtype=features.dtype)
    times = times - times.mean()
    return torch.einsum("t,btpd->bpd", times / times.square().sum().clamp(min=1e-6), features)


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
