"""Put a text in an image's place: an encoder that encodes texts reads it as another reads an image."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from PIL import Image

from mllm.errors import MLLMError


@dataclass(frozen=True)
class TextSource:
    """A text in an image's place: an `mllm.media.images.ImageSource` without pixels."""

    text: str

    def open(self) -> Image.Image:
        """Refuse: there are no pixels.

        Raises:
            MLLMError: always.
        """
        raise MLLMError(
            f"The text {self.text[:60]!r} stands in an image's place, and this encoder reads images alone. Choose an "
            "encoder that encodes texts, such as encoder.type=dual-encoder, or leave out 'see: text'."
        )

    def key(self) -> str:
        """Return a hash of the text, which no image has."""
        return f"text/{hashlib.sha256(self.text.encode()).hexdigest()}"
