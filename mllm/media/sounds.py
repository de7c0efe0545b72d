"""Open sound files as mono samples at a given sampling rate, with limits on bytes and seconds (soundfile, soxr)."""

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
    """Mono samples ``(N,)`` between -1 and 1, and the sampling rate in Hz."""

    samples: np.ndarray[Any, Any]
    rate: int

    def open(self) -> Sound:
        """Return the sound itself: it is already open."""
        return self

    def key(self) -> str:
        """Return a hash of the rate and the samples."""
        return hashlib.sha256(f"{self.rate}".encode() + self.samples.astype(np.float32).tobytes()).hexdigest()


def open_sound(piece: Any, rate: int, seconds: float) -> Sound:
    """Return a sound resampled to a rate, its channels averaged.

    Args:
        piece: a path, bytes, an `ImageSource` of a sound file, or a `Sound`.
        rate: the sampling rate in Hz.
        seconds: the longest duration that is accepted.

    Raises:
        MLLMError: it cannot be read as a sound, or is too long; or the libraries are not installed.
    """
    if not isinstance(piece, Sound):
        stream, label = stream_of(piece, MAX_BYTES, "sound")
        with stream:
            piece = _decoded(stream, label, seconds)
    length = len(piece.samples) / piece.rate
    if not 0 < length <= seconds + 0.01:
        raise MLLMError(
            f"The sound is {length:.2f} seconds long; expected more than 0 and at most {seconds:g}. Split it."
        )
    if piece.rate == rate:
        return piece
    import soxr

    return Sound(soxr.resample(piece.samples, piece.rate, rate), rate)


def _decoded(stream: BinaryIO, label: str, seconds: float) -> Sound:
    try:
        import soundfile
        import soxr  # noqa: F401  # needed to resample
    except ImportError:
        raise MLLMError("Reading sounds needs soundfile and soxr: pip install 'mllm-assembly[audio]'.") from None
    try:
        with soundfile.SoundFile(stream) as file:
            limit = int((seconds + 1) * file.samplerate)  # a longer sound is refused, so the rest need not be read
            samples = file.read(limit, dtype="float32", always_2d=True)
            return Sound(samples.mean(1), file.samplerate)
    except (soundfile.LibsndfileError, ValueError) as error:
        raise MLLMError(f"{label} is not a readable sound: {error} Is the file complete?") from None
