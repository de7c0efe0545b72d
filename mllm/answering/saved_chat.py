"""Write the parts of a conversation's messages as JSON."""

from __future__ import annotations

import base64
import io
from typing import Any

from mllm.errors import MLLMError
from mllm.media.images import ImageFile
from mllm.media.videos import Clip, VideoBytes, VideoFile


def saved_part(part: dict[str, Any]) -> dict[str, Any]:
    """Return a part as JSON can hold it: an image or a video by path where it is a file, else as a data URL.

    Raises:
        MLLMError: it is a list of frames, or a part of a video.
    """
    if part["type"] == "text":
        return part
    source = part["image"]
    if isinstance(source, Clip) or (isinstance(source, VideoFile) and source != VideoFile(source.path)):
        raise MLLMError("A list of frames, or a part of a video, is not saved. Give videos as files or as bytes.")
    if isinstance(source, ImageFile):
        kind = "video" if isinstance(source, VideoFile) else "image"
        return {"type": kind, kind: str(source.path.resolve())}
    if isinstance(source, VideoBytes):
        return {"type": "video_url", "video_url": {"url": _data_url("video/mp4", source.data)}}
    buffer = io.BytesIO()
    source.open().save(buffer, "PNG")
    return {"type": "image", "image": _data_url("image/png", buffer.getvalue())}


def _data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
