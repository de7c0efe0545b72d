"""The routes: `/v1/chat/completions`, `/v1/models`, `/health`, and a chat page at `/`."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from importlib.resources import files
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from mllm.errors import MLLMError
from mllm.serve.batcher import Answer, Batcher, Full, Job
from mllm.serve.remote import Remote
from mllm.serve.requests import BodyLimit, prompt_of
from mllm.serve.schema import (
    Completion,
    Limits,
    Refused,
    error_response,
    images_of_answer,
    refusal,
    server_sent_event,
    usage_of,
)


def create_app(model: Any, name: str, limits: Limits | None = None, show: Mapping[str, Any] | None = None) -> FastAPI:
    """Return the server.

    Args:
        model: the assembly.
        name: what ``/v1/models`` calls it.
        limits: what is let in.
        show: ``index`` and ``eager`` of answers with images; None: words alone. A message then has ``images``, each an
            ``image_url`` with a data URL, and ``at``, the characters of the text before it.
    """
    limits = limits or Limits()
    remote = Remote(limits.hosts, limits.folders)
    batcher = Batcher(model, size=limits.batch, waiting=limits.waiting, show=show)

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(batcher.close)

    app = FastAPI(title="mllm", lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(BodyLimit, limit=limits.body)

    def allowed(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if limits.token is not None and not secrets.compare_digest(given.encode(), limits.token.encode()):
            raise Refused(401, "A bearer token is needed: Authorization: Bearer TOKEN.", "invalid_api_key")

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return error_response(error.status, str(error), error.code)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(step) for step in first["loc"][1:]) or "the body"
        return error_response(400, f"{place}: {first['msg']}", "invalid_request")

    @app.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        nonce = secrets.token_urlsafe(16)
        text = (files("mllm.serve") / "page.html").read_text(encoding="utf-8").replace("{nonce}", nonce)
        own = f"'nonce-{nonce}'"
        policy = f"default-src 'none'; script-src {own}; style-src {own}; img-src data: blob:; connect-src 'self'"
        return HTMLResponse(text, headers={"Content-Security-Policy": policy})

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models", dependencies=[Depends(allowed)])
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "mllm"}]}

    @app.post("/v1/chat/completions", dependencies=[Depends(allowed)])
    async def complete(request: Request, wanted: Completion) -> Response:
        try:
            prompt = await run_in_threadpool(prompt_of, model, wanted.messages, remote, limits)
        except MLLMError as error:
            raise Refused(400, str(error), "invalid_request") from None
        heard: asyncio.Queue[Any] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        job = Job(prompt, wanted.decoding(limits.max_new_tokens), _teller(loop, heard))
        try:
            batcher.submit(job)
        except Full as error:
            raise Refused(429, str(error), "busy") from None
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}
        if wanted.stream:
            usage = bool(wanted.stream_options and wanted.stream_options.include_usage)
            return StreamingResponse(_stream(job, heard, head, usage), media_type="text/event-stream")
        answer = await _whole(request, job, heard)
        message = {"role": "assistant", "content": answer.text, **images_of_answer(answer)}
        choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason, "logprobs": None}
        return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage_of(answer)})

    return app


def _teller(loop: asyncio.AbstractEventLoop, heard: asyncio.Queue[Any]) -> Any:
    def tell(news: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever listened
            loop.call_soon_threadsafe(heard.put_nowait, news)

    return tell


async def _whole(request: Request, job: Job, heard: asyncio.Queue[Any]) -> Answer:
    """Wait for a job's answer; a client that hangs up frees its place."""
    try:
        while True:
            try:
                news = await asyncio.wait_for(heard.get(), timeout=0.25)
            except TimeoutError:
                if await request.is_disconnected():
                    raise Refused(499, "The client hung up.", "gone") from None
                continue
            if isinstance(news, Answer):
                return news
            if isinstance(news, Exception):
                raise refusal(news)
    finally:
        job.gone.set()


async def _stream(job: Job, heard: asyncio.Queue[Any], head: dict[str, Any], usage: bool) -> AsyncIterator[str]:
    """Yield an answer as server-sent events, as OpenAI sends them."""

    def event(delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return server_sent_event({**head, "object": "chat.completion.chunk", "choices": [choice]})

    try:
        yield event({"role": "assistant", "content": ""})
        while True:
            news = await heard.get()
            if isinstance(news, Exception):
                failure = refusal(news)
                failed = {"message": str(failure), "type": "server_error", "code": failure.code}
                yield server_sent_event({"error": failed})
                return
            if isinstance(news, Answer):
                if news.images:
                    yield event(images_of_answer(news))
                yield event({}, news.finish_reason)
                if usage:
                    body = {**head, "object": "chat.completion.chunk", "choices": [], "usage": usage_of(news)}
                    yield server_sent_event(body)
                yield "data: [DONE]\n\n"
                return
            yield event({"content": news})
    finally:
        job.gone.set()
