"""Return answers, whole or as server-sent events, as the batcher sends them.

Also the responses to errors, and the chat page.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from mllm.serve.batcher import Batcher
from mllm.serve.metrics import Metrics
from mllm.serve.rows import Answer, Job
from mllm.serve.schema import (
    Completion,
    Refused,
    error_body,
    error_response,
    images_of_answer,
    refusal,
    server_sent_event,
    usage_of,
)


def handle_errors(app: FastAPI) -> None:
    """Return every error in OpenAI's schema: refused requests, unknown paths, and failures of the server itself."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}. The server has /v1/chat/completions."
        return error_response(Refused(error.status_code, message, "not_found"))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return error_response(Refused(500, f"The server failed: {type(error).__name__}.", "failed"))


def chat_page() -> HTMLResponse:
    """Return the chat page, which may run no script but its own."""
    nonce = secrets.token_urlsafe(16)
    text = (files("mllm.serve") / "page.html").read_text(encoding="utf-8").replace("{nonce}", nonce)
    source = f"'nonce-{nonce}'"
    policy = f"default-src 'none'; script-src {source}; style-src {source}; img-src data: blob:; connect-src 'self'"
    return HTMLResponse(text, headers={"Content-Security-Policy": policy})


class Events:
    """What the batcher sends to one request: pieces of text, then an `Answer` or an error.

    Args:
        batcher: decodes the request's job.
        metrics: counts the answer.
    """

    def __init__(self, batcher: Batcher, metrics: Metrics) -> None:
        self._batcher, self._metrics = batcher, metrics
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._job: Job | None = None

    def send(self, event: Any) -> None:
        """Take an event of another thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits for the event
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    def submit(self, job: Job) -> None:
        """Queue the job, which sends its events here."""
        self._job = job
        self._batcher.submit(job)

    def cancel(self) -> None:
        """Cancel the job, if there is one."""
        if self._job is not None:
            self._batcher.cancel(self._job)

    def failed(self) -> None:
        """Count a failure of an answer whose status, 200, was sent already."""
        self._metrics.add("errors_total")

    async def next(self) -> str | Answer:
        """Return the next piece of text, or the answer.

        Raises:
            Refused: the model failed.
        """
        event: str | Answer | Exception = await self._queue.get()
        if isinstance(event, Exception):
            raise refusal(event)
        if isinstance(event, Answer):
            self._metrics.add("prompt_tokens_total", event.prompt_tokens)
            self._metrics.add("generated_tokens_total", event.completion_tokens)
        return event


async def respond(completion: Completion, events: Events, head: dict[str, Any]) -> Response:
    """Return the response to a completion request.

    Args:
        completion: the request.
        events: of its job.
        head: the fields of every part of the response.

    Raises:
        Refused: the model failed.
    """
    if completion.stream:
        usage = bool(completion.stream_options and completion.stream_options.include_usage)
        return StreamingResponse(_stream(events, head, usage), media_type="text/event-stream")
    while not isinstance(answer := await events.next(), Answer):
        pass
    message = {"role": "assistant", "content": answer.text, "refusal": None, **images_of_answer(answer)}
    choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason, "logprobs": None}
    return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage_of(answer)})


async def _stream(events: Events, head: dict[str, Any], usage: bool) -> AsyncIterator[str]:
    """Yield an answer as server-sent events, as OpenAI sends them."""

    def chunk(delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return server_sent_event({**head, "object": "chat.completion.chunk", "choices": [choice]})

    yield chunk({"role": "assistant", "content": ""})
    try:
        while not isinstance(event := await events.next(), Answer):
            yield chunk({"content": event})
    except Refused as error:
        events.failed()
        yield server_sent_event({"error": error_body(error)})
        return
    if event.images:
        yield chunk(images_of_answer(event))
    yield chunk({}, event.finish_reason)
    if usage:
        yield server_sent_event({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage_of(event)})
    yield "data: [DONE]\n\n"
