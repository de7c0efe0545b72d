"""The entrance to the routes: a request without the token is refused before its body is read; answers are counted."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

import anyio

from mllm.serve.budget import Share
from mllm.serve.metrics import Metrics
from mllm.serve.schema import Limits, Refused, error_response

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Entrance:
    """Refuses a request without the token, and counts the answers to the others.

    Args:
        app: the routes.
        limits: of requests.
        metrics: counts the answers.
    """

    def __init__(self, app: Any, limits: Limits, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics
        self._token = None if limits.token is None else limits.token.encode()

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            return await self._app(scope, receive, send)

        started = False

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._metrics.add("requests_total", status=message["status"])
                self._metrics.add("errors_total", int(message["status"] >= 500))
            await send(message)

        if not self._may_enter(dict(scope["headers"])):
            refused = Refused(401, "A bearer token is needed: Authorization: Bearer TOKEN.", "invalid_api_key")
            return await error_response(refused)(scope, receive, counted)
        try:
            await self._app(scope, receive, counted)
        except asyncio.CancelledError:  # by the server that ends, which waits no longer
            if not started:
                ends = Refused(503, "The server is shutting down. Send the request again later.", "shutting_down")
                await error_response(ends)(scope, receive, counted)

    def _may_enter(self, headers: dict[bytes, bytes]) -> bool:
        """Whether a request carries the token, if one is needed."""
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        return self._token is None or (scheme.lower() == b"bearer" and secrets.compare_digest(token, self._token))


async def read_body(headers: dict[bytes, bytes], receive: Receive, limits: Limits, read: Share) -> bytearray | None:
    """Return a request's body; None: the client has disconnected.

    Args:
        headers: of the request.
        receive: returns the parts of the body.
        limits: of its length and time.
        read: takes its bytes as they arrive.

    Raises:
        Refused: it is too long or too slow, or there are too many others.
    """
    if int(headers.get(b"content-length", b"0")) > limits.body:
        raise _too_long(limits)
    body = bytearray()
    with anyio.move_on_after(limits.deadline):
        while True:
            event = await receive()
            if event["type"] == "http.disconnect":
                return None
            chunk = event.get("body", b"")
            if len(body) + len(chunk) > limits.body:
                raise _too_long(limits)
            if not read.take(len(chunk)):
                raise busy("the requests that are being read have too many bytes")
            body += chunk
            if not event.get("more_body", False):
                return body
    raise Refused(408, f"The request was not sent completely in {limits.deadline:g} seconds. Send it again.", "timeout")


def _too_long(limits: Limits) -> Refused:
    return Refused(413, f"The request is longer than {limits.body} bytes. Make its images smaller.", "too_large")


@contextlib.contextmanager
def while_connected(receive: Receive, send: Send, seconds: float, metrics: Metrics) -> Iterator[Send]:
    """Cancel the block when the client disconnects, or does not take a part of the answer in time.

    Args:
        receive: returns the client's events.
        send: of the answer; the block uses the function that is yielded.
        seconds: for each part of the answer.
        metrics: counts those who left.
    """

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    async def send_in_time(message: Message) -> None:
        with anyio.move_on_after(seconds) as timer:
            await send(message)
        if timer.cancelled_caught:
            scope.cancel()

    with anyio.CancelScope() as scope:
        watching = asyncio.ensure_future(watch())
        try:
            yield send_in_time
        finally:
            watching.cancel()
    if scope.cancelled_caught:
        metrics.add("disconnects_total")


def busy(reason: str) -> Refused:
    """Return the refusal of a request that may be sent again later."""
    return Refused(429, f"The server is busy: {reason}. Try again soon.", "busy")
