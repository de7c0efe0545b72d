"""Open videos as a few frames, evenly spread over the whole, with limits on bytes, frames and pixels (PyAV)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, BinaryIO

from PIL import Image

from mllm.errors import MLLMError
from mllm.media.images import MAX_PIXELS, open_image, stream_of

MAX_BYTES = 2 * 2**30
MAX_FRAMES = 100_000  # an hour at 25 a second
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,ogg,mpeg,mpegts,flv"  # none that names other files


@dataclass(frozen=True, eq=False)
class Clip:
    """A video as pictures, in order."""

    frames: tuple[Image.Image, ...]

    def open(self) -> Any:
        """Return the clip: it is open."""
        return self

    def key(self) -> str:
        """Return a hash of sizes and pixels."""
        parts = [f"{frame.size}".encode() + frame.tobytes() for frame in self.frames]
        return hashlib.sha256(b"".join(parts)).hexdigest()


def open_clip(piece: Any, number: int) -> Clip:
    """Return ``number`` frames of a video, each from the middle of its share; of a shorter one, some of them twice.

    Args:
        piece: a path, bytes, an `ImageSource` of a video file, a `Clip`, or a list of pictures.
        number: of frames.

    Raises:
        MLLMError: it is no video that can be read, or too large a one; PyAV is not installed.
    """
    if isinstance(piece, list | tuple):
        piece = Clip(tuple(open_image(frame) for frame in piece))
    if isinstance(piece, Clip):
        if not piece.frames:
            raise MLLMError("The clip has no frames.")
        return Clip(tuple(piece.frames[place] for place in places(len(piece.frames), number)))
    stream, label = stream_of(piece, MAX_BYTES, "video")
    with stream:
        return _decoded(stream, label, number)


def places(length: int, number: int) -> list[int]:
    """Return the frames in the middle of ``number`` equal shares of ``length``."""
    return [(2 * share + 1) * length // (2 * number) for share in range(number)]


def _decoded(stream: BinaryIO, label: str, number: int) -> Clip:
    av: Any
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        raise MLLMError("Videos are read by PyAV: pip install 'mllm-assembly[video]'.") from None
    try:
        length = _count(av, stream, label)
        wanted = places(length, number)
        stream.seek(0)
        found: dict[int, Image.Image] = {}
        with av.open(stream, options={"format_whitelist": CONTAINERS}) as container:
            for place, frame in enumerate(container.decode(video=0)):
                if place in wanted:
                    found[place] = frame.to_image().rotate(frame.rotation, expand=True)
                if place >= wanted[-1]:
                    break
    except FFmpegError as error:
        raise MLLMError(f"{label} is no video that can be read: {error.strerror}. Is the file whole?") from None
    if wanted[-1] not in found:
        raise MLLMError(f"{label} breaks off: it should have {length} frames. Is the file whole?")
    return Clip(tuple(found[place] for place in wanted))


def _count(av: Any, stream: BinaryIO, label: str) -> int:
    """Return how many frames there are, from the packets' heads: nothing is decoded."""
    with av.open(stream, options={"format_whitelist": CONTAINERS}) as container:
        if not container.streams.video:
            raise MLLMError(f"{label} has no pictures in it, only sound.")
        video = container.streams.video[0]
        if video.codec_context.width * video.codec_context.height > MAX_PIXELS:
            raise MLLMError(f"{label}: {video.codec_context.width} x {video.codec_context.height} pixels are too many.")
        length = 0
        for packet in container.demux(video):
            length += packet.size > 0
            if length > MAX_FRAMES:
                raise MLLMError(f"{label} has more than {MAX_FRAMES} frames. Cut it into shorter ones.")
    if not length:
        raise MLLMError(f"{label} has no frames.")
    return length
