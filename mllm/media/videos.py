"""Open videos as a few frames, evenly spaced in time, with limits on bytes, frames and pixels (PyAV).

How long a video is stands in its header, or is counted in the headers of its packets: nothing is decoded for it.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from mllm.errors import MLLMError
from mllm.media.images import MAX_PIXELS, ImageBytes, ImageFile, ImageSource, open_image, source_of, stream_of

MAX_BYTES = 2 * 2**30
MAX_FRAMES = 100_000  # about an hour at 25 frames per second
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,ogg,mpeg,mpegts,flv"  # none of them can refer to other files
)
SUFFIXES = {".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".ogv", ".3gp"}
DAMAGED = (OSError, EOFError, ValueError, LookupError, ArithmeticError)  # what PyAV raises, besides FFmpeg's errors
RATE = 25.0  # frames per second of a video that names no rate: FFmpeg's assumption


@dataclass(frozen=True, eq=False)
class Clip:
    """The frames of a video, in order.

    Args:
        frames: the images, or image sources, which are opened where they are sampled.
        label: the video's name, for messages.
    """

    frames: tuple[Any, ...]
    label: str = "the list of frames"

    def open(self) -> Image.Image:
        """Return the frame in the middle, for what shows a video as an image; encoders open it as a clip."""
        return open_clip(self, 1).frames[0]

    def key(self) -> str:
        """Return a hash of the frames' sizes and pixels, or of the sources' keys."""
        frames = self.frames
        parts = [f.key().encode() if isinstance(f, ImageSource) else f"{f.size}".encode() + f.tobytes() for f in frames]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def at(self, indices: list[int]) -> Clip:
        """Return the clip of the opened frames at indices."""
        return Clip(tuple(open_image(self.frames[index]) for index in indices), self.label)


@dataclass(frozen=True)
class VideoFile(ImageFile):
    """A video in a file, or a part of one.

    Args:
        path: the file.
        start: of the part, in seconds.
        end: of the part, in seconds; None: the video's.
    """

    start: float = 0.0
    end: float | None = None

    def open(self) -> Image.Image:
        """Return the frame in the middle, for what shows a video as an image; encoders open it as a clip."""
        return open_clip(self, 1).frames[0]

    def key(self) -> str:
        """Return a hash of the file's bytes, and of the part."""
        whole = super().key()
        if (self.start, self.end) == (0.0, None):
            return whole
        return hashlib.sha256(f"{whole} {self.start} {self.end}".encode()).hexdigest()


@dataclass(frozen=True)
class VideoBytes(ImageBytes):
    """A video whose bytes are in memory."""


@dataclass(frozen=True)
class Length:
    """How long a video is.

    Args:
        frames: their number.
        seconds: the time they take.
        side: width times height of a frame, in pixels.
        first: the number of frames before them in the file.
    """

    frames: int
    seconds: float
    side: int
    first: int = 0


Number = int | Callable[[Length], int]  # of the frames to sample


def file_of(path: Path) -> ImageFile:
    """Return a file as an image, or as a video if its name ends like one."""
    return VideoFile(path) if path.suffix.lower() in SUFFIXES else ImageFile(path)


def video_source_of(video: Any) -> Any:
    """Return a video in any accepted form as a source: a path, bytes, a list of images, or a source."""
    if isinstance(video, list | tuple):
        return Clip(tuple(open_image(frame) for frame in video))
    if isinstance(video, bytes):
        return VideoBytes(video, f"the video of {len(video)} bytes")
    return VideoFile(Path(video)) if isinstance(video, str | Path) else source_of(video)


def open_clip(piece: Any, number: Number) -> Clip:
    """Return ``number`` frames: the middles of equal segments of the video; a shorter video has some frames repeated.

    Args:
        piece: a path, bytes, an `ImageSource` of a video file, a `Clip`, or a list of images.
        number: the number of frames, or a function of the video's length, of which the header is then trusted.

    Raises:
        MLLMError: it cannot be read as a video, or is too large; or PyAV is not installed.
    """
    if isinstance(piece, list | tuple):
        piece = Clip(tuple(open_image(frame) for frame in piece))
    if isinstance(piece, Clip):
        check_frames(len(piece.frames))
        count = number if isinstance(number, int) else number(Length(len(piece.frames), 0.0, 0))
        return piece.at(frame_indices(len(piece.frames), count))
    with _video(piece) as (stream, label):
        length = _length(piece, stream, label, trust=not isinstance(number, int))
        count = number if isinstance(number, int) else number(length)
        indices = [length.first + index for index in frame_indices(length.frames, count)]
        return _decoded(stream, label, indices, length.first + length.frames)


def length_of(piece: Any) -> Length:
    """Return how long a video in a file or in bytes is, by its header; of a file it is kept.

    Raises:
        MLLMError: as `open_clip`.
    """
    path = getattr(piece, "path", piece)
    try:
        state = os.stat(path) if isinstance(path, str | Path) else None
    except OSError:
        state = None  # opening it says what is wrong
    if state is not None:
        part = piece if isinstance(piece, VideoFile) else VideoFile(Path(path))
        return _file_length(part, state.st_mtime_ns, state.st_size)
    with _video(piece) as (stream, label):
        return _length(piece, stream, label, trust=True)


def check_frames(number: int) -> None:
    """Check that a list of frames is not empty.

    Raises:
        MLLMError: it is.
    """
    if not number:
        raise MLLMError("The clip has no frames: expected at least one. Give a list of images, or a video.")


def frame_indices(length: int, number: int) -> list[int]:
    """Return the indices of the middle frames of ``number`` equal segments of ``length`` frames."""
    return [(2 * segment + 1) * length // (2 * number) for segment in range(number)]


@functools.lru_cache(maxsize=65536)
def _file_length(part: VideoFile, changed: int, size: int) -> Length:
    """Return the length of a video in a file; ``changed`` and ``size``: of the file, so that a new one is read."""
    with _video(part) as (stream, label):
        return _length(part, stream, label, trust=True)


@contextmanager
def _video(piece: Any) -> Iterator[tuple[BinaryIO, str]]:
    """Open a video's bytes, and turn FFmpeg's errors into a message that names it."""
    stream, label = stream_of(piece, MAX_BYTES, "video")
    try:
        from av.error import FFmpegError
    except ImportError:
        raise MLLMError("Reading videos needs PyAV: pip install 'mllm-assembly[video]'.") from None
    with stream:
        try:
            yield stream, label
        except MLLMError:
            raise
        except (FFmpegError, *DAMAGED) as error:
            reason = getattr(error, "strerror", None) or error
            raise MLLMError(f"{label} is not a readable video: {reason}. Is the file complete?") from None


def _container(stream: BinaryIO) -> Any:
    import av

    return av.open(stream, options={"format_whitelist": CONTAINERS}, metadata_errors="ignore")


def _decoded(stream: BinaryIO, label: str, indices: list[int], length: int) -> Clip:
    stream.seek(0)
    wanted = set(indices)
    frames: dict[int, Image.Image] = {}
    with _container(stream) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index in wanted:
                frames[index] = frame.to_image().rotate(frame.rotation, expand=True)
            if index >= indices[-1]:
                break
    if indices[-1] not in frames:
        raise MLLMError(f"{label} is truncated: expected {length} frames. Is the file complete?")
    return Clip(tuple(frames[index] for index in indices), label)


def _length(piece: Any, stream: BinaryIO, label: str, *, trust: bool) -> Length:
    """Return how long a video is, or the part that a `VideoFile` names, without decoding it.

    ``trust``: the number of frames is that of the header, if its container has an index of them.

    Raises:
        MLLMError: there is no video stream, or it is empty, too long or too large, or ends before the part.
    """
    with _container(stream) as container:
        if not container.streams.video:
            streams = "only sound" if container.streams.audio else "so no frames"
            raise MLLMError(f"{label} has no video stream, {streams}. Give a file with a video.")
        video = container.streams.video[0]
        if video.codec_context is None:
            raise MLLMError(f"{label} is not a readable video: its codec is not known. Is the file complete?")
        width, height = video.codec_context.width, video.codec_context.height
        if width * height > MAX_PIXELS:
            raise MLLMError(f"{label}: {width} x {height} pixels; at most {MAX_PIXELS} are decoded. Make it smaller.")
        rate = float(video.average_rate or RATE)
        frames = (_indexed(container, video, rate) if trust else 0) or _counted(container, video, label)
    if frames > MAX_FRAMES:
        raise MLLMError(f"{label} has more than {MAX_FRAMES} frames, which is the limit. Split it into shorter files.")
    if not frames:
        raise MLLMError(f"{label} has no frames: expected at least one. Is the file complete?")
    whole = Length(frames, frames / rate, width * height)
    return _part(whole, piece, label) if isinstance(piece, VideoFile) else whole


def _part(whole: Length, source: VideoFile, label: str) -> Length:
    """Return the length of a part of a video, which has at least one frame."""
    rate = whole.frames / whole.seconds
    first = round(source.start * rate)
    if first >= whole.frames:
        raise MLLMError(f"{label} has {whole.seconds:g} seconds, and the part of it starts at {source.start:g}.")
    last = whole.frames if source.end is None else min(whole.frames, round(source.end * rate))
    frames = max(1, last - first)
    return Length(frames, frames / rate, whole.side, first)


def _indexed(container: Any, video: Any, rate: float) -> int:
    """Return the number of frames that an MP4 file's index has; 0: it has none, or does not play all of them."""
    if "mp4" not in container.format.name.split(",") or not video.duration or not video.time_base:
        return 0
    played = float(video.duration * video.time_base) * rate
    return int(video.frames) if abs(played - video.frames) <= 1 else 0


def _counted(container: Any, video: Any, label: str) -> int:
    """Return the number of frames, counted in the headers of the packets."""
    length = 0
    for packet in container.demux(video):
        length += packet.size > 0
        if length > MAX_FRAMES:
            break
    return length
