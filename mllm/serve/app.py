"""The routes: `/v1/chat/completions`, `/v1/models`, `/v1/models/ID`, `/health`, and a chat page at `/`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response
from starlette.concurrency import run_in_threadpool

from mllm.errors import MLLMError
from mllm.model import Model
from mllm.serve.batcher import Batcher
from mllm.serve.fields import read_completion
from mllm.serve.remote import Remote
from mllm.serve.requests import Entrance, prompt_of
from mllm.serve.responses import chat_page, handle_errors, respond
from mllm.serve.schema import Limits, Refused, invalid_request


def create_app(model: Model, name: str, limits: Limits | None = None, show: Mapping[str, Any] | None = None) -> FastAPI:
    """Return the server.

    Args:
        model: the model.
        name: its id in ``/v1/models``.
        limits: of requests.
        show: ``index`` and ``image_logit_bias`` of answers with images; None: text alone. A message then has
            ``images``, each an ``image_url`` with a data URL, and ``at``, the number of characters of text before it.
    """
    limits = limits or Limits()
    remote = Remote(limits.hosts, limits.folders)
    about = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "mllm"}
    batcher = Batcher(model, size=limits.batch, waiting=limits.waiting, show=show)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(batcher.close)

    app = FastAPI(title="mllm", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Entrance, limits=limits)
    handle_errors(app)

    @app.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        return chat_page()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [about]}

    @app.get("/v1/models/{model_id:path}")
    async def model_of(model_id: str) -> dict[str, Any]:
        if model_id != name:
            raise Refused(404, f"There is no model {model_id!r}; this server has {name!r}.", "model_not_found", "model")
        return about

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        completion = read_completion(await request.body())
        try:
            prompt = await run_in_threadpool(prompt_of, model, completion.messages, remote, limits)
        except MLLMError as error:
            raise invalid_request(str(error), "messages") from None
        return await respond(request, completion, prompt, batcher, name, limits)

    return app
