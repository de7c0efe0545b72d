"""Read requests: check their token and size, open their images, and turn their messages into a prompt."""

from __future__ import annotations

import secrets
from typing import Any

from jinja2 import TemplateError

from mllm.errors import MLLMError
from mllm.media.images import open_image, source_of
from mllm.model import Model
from mllm.prompts.messages import checked_messages, turns
from mllm.prompts.pieces import images_of
from mllm.serve.remote import Remote
from mllm.serve.schema import Limits, Refused, error_response


def prompt_of(model: Model, messages: list[dict[str, Any]], remote: Remote, limits: Limits) -> list[Any]:
    """Return a conversation as a prompt whose images are opened and whose length fits.

    Raises:
        MLLMError: the conversation is not one that this model can answer.
    """
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    count = sum(isinstance(part, dict) and part.get("type") == "image_url" for part in parts)
    if count > limits.images:
        raise MLLMError(f"The request has {count} images; at most {limits.images} are allowed.")
    if count and (model.encoder is None or model.connector is None):
        raise MLLMError("This model has no encoder and connector, so it takes no images: send text alone.")
    checked = checked_messages([_message(message, remote) for message in messages])
    if checked[-1]["role"] != "user":
        raise MLLMError("The last message must be the user's, which is answered.")
    pieces = _pieces(model, checked)
    model.encode(pieces)
    return [model.encoder.open(piece) if images_of([piece]) else piece for piece in pieces]


def _pieces(model: Model, messages: list[dict[str, Any]]) -> list[Any]:
    try:
        return turns(model, messages)
    except MLLMError:
        raise
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:  # raised by the template
        reason = str(error).strip().rstrip(".") or type(error).__name__
        raise MLLMError(f"The model's chat template refuses the conversation: {reason}. Change its messages.") from None


def _message(message: dict[str, Any], remote: Remote) -> dict[str, Any]:
    """Return a message of OpenAI's schema with its images read; local paths in it are never opened."""
    role = "system" if message.get("role") == "developer" else message.get("role")
    for name in ("tool_calls", "function_call", "audio"):
        if message.get(name):
            raise MLLMError(f"A message has {name}, which is not supported. Send its text as 'content'.")
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, list):
        content = [_part(part, remote) for part in content]
    return {"role": role, "content": content}


def _part(part: Any, remote: Remote) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "refusal") and isinstance(part.get(kind), str):
        return {"type": "text", "text": part[kind]}
    if kind == "image_url":
        image = part.get("image_url")
        url = image.get("url") if isinstance(image, dict) else image
        if isinstance(url, str):
            return {"type": "image", "image": source_of(open_image(remote.read(url)))}
    raise MLLMError(
        f"A part of a message is a text or an image_url; got {str(part)[:80]!r}. Expected "
        "{'type': 'text', 'text': ...} or {'type': 'image_url', 'image_url': {'url': ...}}."
    )


class Entrance:
    """Refuses a request without the token, or with a body that is too long, before all of it is in memory."""

    def __init__(self, app: Any, limits: Limits) -> None:
        self._app, self._limit = app, limits.body
        self._token = None if limits.token is None else limits.token.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        if scope["path"].startswith("/v1/") and not self._may_enter(headers):
            message = "A bearer token is needed: Authorization: Bearer TOKEN."
            return await error_response(Refused(401, message, "invalid_api_key"))(scope, receive, send)
        message = f"The request is longer than {self._limit} bytes. Make its images smaller."
        too_long = error_response(Refused(413, message, "too_large"))
        body, more = bytearray(), True
        if int(headers.get(b"content-length", b"0")) > self._limit:
            return await too_long(scope, receive, send)
        while more and scope["method"] == "POST":
            event = await receive()
            if event["type"] == "http.disconnect":
                return None
            body += event.get("body", b"")
            more = event.get("more_body", False)
            if len(body) > self._limit:
                return await too_long(scope, receive, send)
        first = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Any:
            return first.pop() if first else await receive()

        return await self._app(scope, replay, send)

    def _may_enter(self, headers: dict[bytes, bytes]) -> bool:
        """Whether a request carries the token, if one is needed."""
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        return self._token is None or (scheme.lower() == b"bearer" and secrets.compare_digest(token, self._token))
