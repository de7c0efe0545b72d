"""Sample as many frames of a video as its length asks for, and cut them into segments that are encoded by themselves.

The number of frames follows from the video's header, so it is known before anything is decoded. An image is a video of
one frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mllm.errors import MLLMError
from mllm.media.formats import is_still
from mllm.media.images import ImageBytes, ImageFile, open_image, stream_of
from mllm.media.tiles import Cutting, Layout
from mllm.media.videos import MAX_BYTES, Clip, Length, VideoFile, check_frames, length_of, open_clip

HEAD = 64  # bytes, of which it is known whether a file is an image


@dataclass(frozen=True)
class Sampling(Cutting):
    """How many frames of a video are sampled, evenly spaced, and how they are cut into segments.

    A list of frames, a clip and an image are sampled already: only ``most`` applies to them.

    Args:
        segment: T, the frames of a segment; the number of frames is rounded up to a multiple, and some are repeated.
        fps: frames per second; None: ``most`` frames, or all of a video that has fewer.
        least: the least number of frames of a video; of a shorter one some are repeated.
        most: the most.
        budget: the most visual tokens of a video; None: no limit.
    """

    segment: int
    fps: float | None
    least: int
    most: int
    budget: int | None = None

    def measured(self, image: Any) -> Layout:
        """Return the segments of a video; an image has one.

        Raises:
            MLLMError: it cannot be read.
        """
        given = _frames_of(image)
        return self._layout(self._whole(given) if given is not None else self.number(length_of(image)))

    def open(self, piece: Any) -> Clip:
        """Return the sampled frames of a video in any accepted form, or of an image.

        Raises:
            MLLMError: it cannot be read.
        """
        if isinstance(piece, Clip | list | tuple) or _frames_of(piece) is None:
            return open_clip(piece, self.number)
        return open_clip([open_image(piece)], self.number)

    @staticmethod
    def is_given(piece: Any) -> bool:
        """Whether a piece is no video in a file or in bytes, but an image or a list of frames."""
        return _frames_of(piece) is not None

    def number(self, length: Length) -> int:
        """Return the number of frames that are sampled of a video."""
        if not length.seconds:  # frames that were given
            return self._whole(length.frames)
        wished = length.frames if self.fps is None else round(length.seconds * self.fps)
        return self._whole(max(self.least, min(wished, length.frames)))

    def cut(self, image: Clip) -> list[Clip]:
        """Return the segments of a sampled video."""
        starts = range(0, len(image.frames), self.segment)
        return [image.at(list(range(start, start + self.segment))) for start in starts]

    @cached_property
    def fullest(self) -> list[Layout]:
        """The segments of the longest video."""
        return [self._layout(self._whole(self.most))]

    def within(self, tokens: int) -> Sampling:
        """Return the sampling whose longest video takes at most ``budget`` tokens, where a segment takes ``tokens``.

        Raises:
            MLLMError: a single segment, or the least number of frames, takes more.
        """
        if self.budget is None:
            return self
        most, needed = self.budget // tokens * self.segment, self._whole(self.least)
        if most < needed:
            raise MLLMError(
                f"encoder.max_tokens is {self.budget}, and {needed} frames take {needed // self.segment * tokens} "
                "visual tokens. Raise it, lower encoder.least, or let the connector make fewer tokens."
            )
        return replace(self, most=min(self.most, most), budget=None)

    def _whole(self, frames: int) -> int:
        """Return a number of frames within ``most``, rounded up to whole segments."""
        most = max(self.segment, self.most // self.segment * self.segment)
        return min(most, math.ceil(max(1, frames) / self.segment) * self.segment)

    def _layout(self, frames: int) -> Layout:
        """Return the layout of a number of frames: segments below each other, of which the middle one shows it."""
        number = frames // self.segment
        return Layout(size=(1, number), grid=(number, 1), tiles=number, whole=number // 2, unpad=False)


def middle(clips: Sequence[Clip], frames: int) -> list[Clip]:
    """Return the segments of ``frames`` frames that show whole clips: of a longer one the middle segment."""
    starts = [len(clip.frames) // frames // 2 * frames for clip in clips]
    return [clip.at(list(range(start, start + frames))) for clip, start in zip(clips, starts, strict=True)]


def _frames_of(piece: Any) -> int | None:
    """Return the number of frames of a list, a clip or an image; None: a video in a file or in bytes."""
    if isinstance(piece, Clip | list | tuple):
        number = len(piece.frames if isinstance(piece, Clip) else piece)
        check_frames(number)
        return number
    if isinstance(piece, VideoFile):
        return None
    if not isinstance(piece, ImageFile | ImageBytes | Path | bytes):
        return 1
    stream, _ = stream_of(piece, MAX_BYTES, "video")
    with stream:
        return 1 if is_still(stream.read(HEAD)) else None
