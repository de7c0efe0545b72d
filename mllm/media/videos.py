"""Open videos as a few frames, evenly spaced in time, with limits on bytes, frames and pixels (PyAV)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, BinaryIO

from PIL import Image

from mllm.errors import MLLMError
from mllm.media.images import MAX_PIXELS, open_image, stream_of

MAX_BYTES = 2 * 2**30
MAX_FRAMES = 100_000  # about an hour at 25 frames per second
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,ogg,mpeg,mpegts,flv"  # none of them can refer to other files
)


@dataclass(frozen=True, eq=False)
class Clip:
    """The frames of a video as images, in order."""

    frames: tuple[Image.Image, ...]

    def open(self) -> Clip:
        """Return the clip itself: it is already open."""
        return self

    def key(self) -> str:
        """Return a hash of the frames' sizes and pixels."""
        parts = [f"{frame.size}".encode() + frame.tobytes() for frame in self.frames]
        return hashlib.sha256(b"".join(parts)).hexdigest()


def open_clip(piece: Any, number: int) -> Clip:
    """Return ``number`` frames: the middles of equal segments of the video; a shorter video has some frames repeated.

    Args:
        piece: a path, bytes, an `ImageSource` of a video file, a `Clip`, or a list of images.
        number: the number of frames.

    Raises:
        MLLMError: it cannot be read as a video, or is too large; or PyAV is not installed.
    """
    if isinstance(piece, list | tuple):
        piece = Clip(tuple(open_image(frame) for frame in piece))
    if isinstance(piece, Clip):
        if not piece.frames:
            raise MLLMError("The clip has no frames: expected at least one. Give a list of images, or a video.")
        return Clip(tuple(piece.frames[index] for index in frame_indices(len(piece.frames), number)))
    stream, label = stream_of(piece, MAX_BYTES, "video")
    with stream:
        return _decoded(stream, label, number)


def frame_indices(length: int, number: int) -> list[int]:
    """Return the indices of the middle frames of ``number`` equal segments of ``length`` frames."""
    return [(2 * segment + 1) * length // (2 * number) for segment in range(number)]


def _decoded(stream: BinaryIO, label: str, number: int) -> Clip:
    av: Any
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        raise MLLMError("Reading videos needs PyAV: pip install 'mllm-assembly[video]'.") from None
    try:
        length = _count(av, stream, label)
        indices = frame_indices(length, number)
        stream.seek(0)
        frames: dict[int, Image.Image] = {}
        with av.open(stream, options={"format_whitelist": CONTAINERS}) as container:
            for index, frame in enumerate(container.decode(video=0)):
                if index in indices:
                    frames[index] = frame.to_image().rotate(frame.rotation, expand=True)
                if index >= indices[-1]:
                    break
    except FFmpegError as error:
        raise MLLMError(f"{label} is not a readable video: {error.strerror}. Is the file complete?") from None
    if indices[-1] not in frames:
        raise MLLMError(f"{label} is truncated: expected {length} frames. Is the file complete?")
    return Clip(tuple(frames[index] for index in indices))


def _count(av: Any, stream: BinaryIO, label: str) -> int:
    """Return the number of frames, counted in the packet headers without decoding.

    Raises:
        MLLMError: there is no video stream, or it is empty, too long or too large.
    """
    with av.open(stream, options={"format_whitelist": CONTAINERS}) as container:
        if not container.streams.video:
            raise MLLMError(f"{label} has no video stream, only sound. Give a file with a video.")
        video = container.streams.video[0]
        width, height = video.codec_context.width, video.codec_context.height
        if width * height > MAX_PIXELS:
            raise MLLMError(f"{label}: {width} x {height} pixels; at most {MAX_PIXELS} are decoded. Make it smaller.")
        length = 0
        for packet in container.demux(video):
            length += packet.size > 0
            if length > MAX_FRAMES:
                raise MLLMError(
                    f"{label} has more than {MAX_FRAMES} frames, which is the limit. Split it into shorter files."
                )
    if not length:
        raise MLLMError(f"{label} has no frames: expected at least one. Is the file complete?")
    return length
