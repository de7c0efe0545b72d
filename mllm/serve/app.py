"""The routes: `/v1/chat/completions`, `/v1/models`, `/health`, and a chat page at `/`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from mllm.errors import MLLMError
from mllm.media.images import open_image, source_of
from mllm.outputs import data_url
from mllm.prompts.messages import checked_messages, turns
from mllm.serve.batcher import Answer, Batcher, Full, Job
from mllm.serve.remote import Remote


@dataclass(frozen=True)
class Limits:
    """What the server lets in."""

    body: int = 32 * 2**20  # bytes of a request
    images: int = 8  # of a request
    max_new_tokens: int = 512  # of an answer
    batch: int = 16  # requests that are decoded together
    waiting: int = 64  # requests that may wait
    hosts: Collection[str] = ()  # that pictures may be downloaded from
    folders: Collection[Path] = ()  # that pictures may be read from
    token: str | None = None  # a bearer token that every request to /v1 must carry


class StreamOptions(BaseModel):
    """OpenAI's ``stream_options``."""

    include_usage: bool = False


class Completion(BaseModel):
    """A request, in OpenAI's schema; fields of it that are not listed are ignored."""

    model_config = ConfigDict(extra="ignore")
    messages: list[dict[str, Any]] = Field(min_length=1)
    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    n: Literal[1] = 1

    def decoding(self, limit: int) -> dict[str, Any]:
        """Return the settings of our own decoding."""
        tokens = self.max_completion_tokens or self.max_tokens
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        given = {
            "max_new_tokens": tokens and min(tokens, limit),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "stop_strings": [stop for stop in stops or [] if stop] or None,
        }
        return {key: value for key, value in given.items() if value is not None}


class Refused(Exception):
    """A request that is not answered, with its HTTP status."""

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


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
    app.add_middleware(_BodyLimit, limit=limits.body)

    def allowed(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if limits.token is not None and not secrets.compare_digest(given.encode(), limits.token.encode()):
            raise Refused(401, "A bearer token is needed: Authorization: Bearer TOKEN.", "invalid_api_key")

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return _error(error.status, str(error), error.code)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(step) for step in first["loc"][1:]) or "the body"
        return _error(400, f"{place}: {first['msg']}", "invalid_request")

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
            prompt = await run_in_threadpool(_prompt, model, wanted.messages, remote, limits)
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
        message = {"role": "assistant", "content": answer.text, **_images(answer)}
        choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason, "logprobs": None}
        return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": _usage(answer)})

    return app


def _prompt(model: Any, messages: list[dict[str, Any]], remote: Remote, limits: Limits) -> list[Any]:
    """Return a conversation as a prompt whose images are opened and whose length fits."""
    resolved = [{**message, "content": _content(message.get("content"), remote)} for message in messages]
    count = sum(part["type"] == "image" for m in resolved if isinstance(m["content"], list) for part in m["content"])
    if count > limits.images:
        raise MLLMError(f"The request has {count} images; at most {limits.images} are taken.")
    checked = checked_messages(resolved)
    if checked[-1]["role"] != "user":
        raise MLLMError("The last message must be the user's: it is what is answered.")
    pieces = turns(model, checked)
    model.encode(pieces)
    return pieces


def _content(content: Any, remote: Remote) -> Any:
    """Return a message's content with its image URLs read; a local path in it is never opened."""
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
                raise _failure(news)
    finally:
        job.gone.set()


async def _stream(job: Job, heard: asyncio.Queue[Any], head: dict[str, Any], usage: bool) -> AsyncIterator[str]:
    """Yield an answer as server-sent events, as OpenAI sends them."""

    def event(delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return _event({**head, "object": "chat.completion.chunk", "choices": [choice]})

    try:
        yield event({"role": "assistant", "content": ""})
        while True:
            news = await heard.get()
            if isinstance(news, Exception):
                failure = _failure(news)
                yield _event({"error": {"message": str(failure), "type": "server_error", "code": failure.code}})
                return
            if isinstance(news, Answer):
                if news.images:
                    yield event(_images(news))
                yield event({}, news.finish_reason)
                if usage:
                    body = {**head, "object": "chat.completion.chunk", "choices": [], "usage": _usage(news)}
                    yield _event(body)
                yield "data: [DONE]\n\n"
                return
            yield event({"content": news})
    finally:
        job.gone.set()


def _images(answer: Answer) -> dict[str, Any]:
    """Return the part of a message that shows an answer's images, if there are any."""
    found = [
        {"type": "image_url", "image_url": {"url": data_url(image)}, "at": at, "score": image.score}
        for at, image in answer.images
    ]
    return {"images": found} if found else {}


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


def _failure(error: Exception) -> Refused:
    if isinstance(error, MLLMError):
        return Refused(400, str(error), "invalid_request")
    return Refused(500, f"The model failed: {type(error).__name__}.", "failed")


def _usage(answer: Answer) -> dict[str, int]:
    total = answer.prompt_tokens + answer.completion_tokens
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": total,
    }


def _error(status: int, message: str, code: str) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    headers = {"Retry-After": "1"} if status == 429 else None
    return JSONResponse({"error": {"message": message, "type": kind, "code": code}}, status, headers=headers)


class _BodyLimit:
    """Refuses a request whose body is too long, said or found while it comes in, before it is all in memory."""

    def __init__(self, app: Any, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        said = dict(scope["headers"]).get(b"content-length", b"0")
        body, more = b"", True
        if int(said) > self._limit:
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
        message = f"The request is longer than {self._limit} bytes. Make its pictures smaller."
        await _error(413, message, "too_large")(scope, receive, send)
