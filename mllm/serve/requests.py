"""Read requests: limit their size, open their images, and turn their messages into a prompt."""

from __future__ import annotations

from typing import Any

from mllm.errors import MLLMError
from mllm.media.images import open_image, source_of
from mllm.model import Model
from mllm.prompts.messages import checked_messages, turns
from mllm.serve.remote import Remote
from mllm.serve.schema import Limits, error_response


def prompt_of(model: Model, messages: list[dict[str, Any]], remote: Remote, limits: Limits) -> list[Any]:
    """Return a conversation as a prompt whose images are opened and whose length fits."""
    resolved = [{**message, "content": _content(message.get("content"), remote)} for message in messages]
    count = sum(part["type"] == "image" for m in resolved if isinstance(m["content"], list) for part in m["content"])
    if count > limits.images:
        raise MLLMError(f"The request has {count} images; at most {limits.images} are allowed.")
    checked = checked_messages(resolved)
    if checked[-1]["role"] != "user":
        raise MLLMError("The last message must be the user's, which is answered.")
    pieces = turns(model, checked)
    model.encode(pieces)
    return pieces


def _content(content: Any, remote: Remote) -> Any:
    """Return a message's content with its image URLs read; local paths in it are never opened."""
    if not isinstance(content, list):
        return content
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image_url" and isinstance(part.get("image_url"), dict):
            data = remote.read(str(part["image_url"].get("url")))
            parts.append({"type": "image", "image": source_of(open_image(data))})
        elif kind == "text":
            parts.append(part)
        else:
            raise MLLMError(f"A part of a message is a text or an image_url; got {str(part)[:80]!r}.")
    return parts


class BodyLimit:
    """Refuses a request whose body is too long, by its header or while it arrives, before all of it is in memory."""

    def __init__(self, app: Any, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        body, more = b"", True
        if int(length) > self._limit:
            return await self._refuse(scope, receive, send)
        while more and scope["method"] == "POST":
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > self._limit:
                return await self._refuse(scope, receive, send)
        first = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Any:
            return first.pop() if first else await receive()

        return await self._app(scope, replay, send)

    async def _refuse(self, scope: Any, receive: Any, send: Any) -> None:
        message = f"The request is longer than {self._limit} bytes. Make its images smaller."
        await error_response(413, message, "too_large")(scope, receive, send)
