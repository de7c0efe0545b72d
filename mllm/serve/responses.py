"""Answer a request: submit its prompt to the batcher, and return the answer whole or as server-sent events.

Also the responses to errors, and the chat page.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from mllm.errors import MLLMError
from mllm.serve.batcher import Answer, Batcher, Full, Job
from mllm.serve.schema import (
    Completion,
    Limits,
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


async def respond(
    request: Request, completion: Completion, prompt: list[Any], batcher: Batcher, name: str, limits: Limits
) -> Response:
    """Return the response to a completion request.

    Args:
        request: the HTTP request.
        completion: its body.
        prompt: its conversation, as an interleaved prompt.
        batcher: decodes it.
        name: of the model.
        limits: of requests.

    Raises:
        Refused: an invalid option, an answer that does not fit, too many requests that wait, or a client that
            disconnected.
    """
    events: asyncio.Queue[Any] = asyncio.Queue()
    send = _sender(asyncio.get_running_loop(), events)
    options = completion.decoding_options(limits.max_new_tokens)
    try:
        job = await run_in_threadpool(batcher.job, prompt, options, send, limits.max_new_tokens)
        batcher.submit(job)
    except Full as error:
        raise Refused(429, str(error), "busy") from None
    except MLLMError as error:
        raise refusal(error) from None
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}
    if completion.stream:
        usage = bool(completion.stream_options and completion.stream_options.include_usage)
        return StreamingResponse(_stream(job, events, head, usage), media_type="text/event-stream")
    answer = await _wait(request, job, events)
    message = {"role": "assistant", "content": answer.text, "refusal": None, **images_of_answer(answer)}
    choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason, "logprobs": None}
    return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage_of(answer)})


def _sender(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Any]) -> Callable[[Any], None]:
    """Return a function that puts events of another thread into a queue of the event loop."""

    def send(event: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits for the event
            loop.call_soon_threadsafe(events.put_nowait, event)

    return send


async def _wait(request: Request, job: Job, events: asyncio.Queue[Any]) -> Answer:
    """Wait for a job's answer; a client that disconnects cancels the job."""
    try:
        while True:
            try:
                event = await asyncio.wait_for(events.get(), timeout=0.25)
            except TimeoutError:
                if await request.is_disconnected():
                    raise Refused(499, "The client disconnected.", "gone") from None
                continue
            if isinstance(event, Answer):
                return event
            if isinstance(event, Exception):
                raise refusal(event)
    finally:
        job.cancelled.set()


async def _stream(job: Job, events: asyncio.Queue[Any], head: dict[str, Any], usage: bool) -> AsyncIterator[str]:
    """Yield an answer as server-sent events, as OpenAI sends them."""

    def chunk(delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return server_sent_event({**head, "object": "chat.completion.chunk", "choices": [choice]})

    try:
        yield chunk({"role": "assistant", "content": ""})
        while True:
            event = await events.get()
            if isinstance(event, Exception):
                yield server_sent_event({"error": error_body(refusal(event))})
                return
            if isinstance(event, Answer):
                if event.images:
                    yield chunk(images_of_answer(event))
                yield chunk({}, event.finish_reason)
                if usage:
                    body = {**head, "object": "chat.completion.chunk", "choices": [], "usage": usage_of(event)}
                    yield server_sent_event(body)
                yield "data: [DONE]\n\n"
                return
            yield chunk({"content": event})
    finally:
        job.cancelled.set()
