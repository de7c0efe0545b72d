"""Open sound files as samples at one rate, one channel, with limits on bytes and seconds (soundfile, soxr)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from mllm.errors import MLLMError
from mllm.media.images import stream_of

MAX_BYTES = 512 * 2**20


@dataclass(frozen=True, eq=False)
class Sound:
    """Samples ``(N,)`` between -1 and 1, and how many there are a second."""

    samples: np.ndarray[Any, Any]
    rate: int

    def open(self) -> Any:
        """Return the sound: it is open."""
        return self

    def key(self) -> str:
        """Return a hash of rate and samples."""
        return hashlib.sha256(f"{self.rate}".encode() + self.samples.astype(np.float32).tobytes()).hexdigest()


def open_sound(piece: Any, rate: int, seconds: float) -> Sound:
    """Return a sound at a rate, its channels averaged.

    Args:
        piece: a path, bytes, an `ImageSource` of a sound file, or a `Sound`.
        rate: samples a second.
        seconds: the longest that is taken.

    Raises:
        MLLMError: it is no sound that can be read, or too long; the libraries are not installed.
    """
    if not isinstance(piece, Sound):
        stream, label = stream_of(piece, MAX_BYTES, "sound")
        with stream:
            piece = _decoded(stream, label, seconds)
    length = len(piece.samples) / piece.rate
    if not 0 < length <= seconds + 0.01:
        raise MLLMError(f"The sound takes {length:.2f} seconds; from 0 to {seconds:g} are taken. Cut it into parts.")
    if piece.rate == rate:
        return piece
    import soxr

    return Sound(soxr.resample(piece.samples, piece.rate, rate), rate)


def _decoded(stream: BinaryIO, label: str, seconds: float) -> Sound:
    try:
        import soundfile
        import soxr  # noqa: F401  # needed for another rate
    except ImportError:
        raise MLLMError("Sounds are read by soundfile and soxr: pip install 'mllm-assembly[audio]'.") from None
    try:
        with soundfile.SoundFile(stream) as file:
            most = int((seconds + 1) * file.samplerate)  # what is longer is refused, and need not be read
            samples = file.read(most, dtype="float32", always_2d=True)
            return Sound(samples.mean(1), file.samplerate)
    except (soundfile.LibsndfileError, ValueError) as error:
        raise MLLMError(f"{label} is no sound that can be read: {error}") from None
