"""Decode data URLs as clients write them: with line breaks, without padding, in the alphabet of URLs."""

from __future__ import annotations

import base64
import re
from urllib.parse import unquote_to_bytes

from mllm.errors import MLLMError


def is_data_url(text: str) -> bool:
    """Whether a text is a data URL; the scheme may be in capitals."""
    return text[:16].lstrip()[:5].lower() == "data:"


def from_data_url(url: str, limit: int) -> bytes:
    """Return the bytes of a data URL in base64.

    The media type and the padding may be missing, white space and percent-encoding are removed, and the alphabets of
    base64 and of its variant for URLs are read.

    Args:
        url: the data URL.
        limit: the most bytes that are decoded.

    Raises:
        MLLMError: it is not in base64, is damaged, or has more bytes.
    """
    head, comma, body = url.partition(",")
    if not comma or not re.search(r";\s*base64\s*$", head, re.IGNORECASE):
        raise MLLMError(f"The data URL starts with {head[:40]!r}; expected data:image/...;base64,...")
    try:
        plain = body.encode("ascii")
    except UnicodeEncodeError:
        raise MLLMError(
            "The data URL is not valid base64: it has other characters than ASCII. Encode it again."
        ) from None
    plain = b"".join((unquote_to_bytes(plain) if b"%" in plain else plain).split()).rstrip(b"=")
    if len(plain) * 3 // 4 > limit:
        raise MLLMError(f"The data URL encodes more than {limit} bytes, which is the limit. Make the image smaller.")
    try:
        return base64.b64decode(
            plain.translate(bytes.maketrans(b"-_", b"+/")) + b"=" * (-len(plain) % 4), validate=True
        )
    except ValueError as error:
        raise MLLMError(f"The data URL is not valid base64: {error}. Encode the image file as base64.") from None
