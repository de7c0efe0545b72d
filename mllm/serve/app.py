"""The routes: `/v1/chat/completions`, `/v1/models`, `/v1/models/ID`, `/health`, `/metrics`, and a chat page at `/`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, PlainTextResponse

from mllm.capabilities import RunsOnEngine
from mllm.model import Model
from mllm.serve.batcher import Batcher
from mllm.serve.completions import Completions
from mllm.serve.entrance import Entrance
from mllm.serve.forwarder import Forwarder
from mllm.serve.memory import trimmed
from mllm.serve.metrics import Metrics
from mllm.serve.responses import chat_page, handle_errors
from mllm.serve.schema import Limits, Refused

CLOSING = 1.0  # seconds for the step of the model that runs when the server ends


def create_app(model: Model, name: str, limits: Limits | None = None, show: Mapping[str, Any] | None = None) -> FastAPI:
    """Return the server.

    Args:
        model: the model.
        name: its id in ``/v1/models``.
        limits: of requests.
        show: ``index`` and ``image_logit_bias`` of answers with images; None: text alone. A message then has
            ``images``, each an ``image_url`` with a data URL, and ``at``, the number of characters of text before it.
    """
    limits, metrics = limits or Limits(), Metrics()
    about = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "mllm"}
    decoder = Forwarder if isinstance(model.lm, RunsOnEngine) else Batcher
    batcher = decoder(model, size=limits.batch, show=show, metrics=metrics)
    metrics.watch(
        {
            "queue_length": lambda: batcher.waiting,
            "batch_size": lambda: batcher.running,
            "tokens_per_second": lambda: metrics.tokens_per_second,
        }
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with trimmed(metrics.requests):
            yield
        await asyncio.to_thread(batcher.close, CLOSING)

    app = FastAPI(title="mllm", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Entrance, limits=limits, metrics=metrics)
    completions: Any = Completions(model, name, limits, batcher, metrics)
    app.add_route("/v1/chat/completions", completions, methods=["POST"])
    handle_errors(app)

    @app.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        return chat_page()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def counts() -> PlainTextResponse:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [about]}

    @app.get("/v1/models/{model_id:path}")
    async def model_of(model_id: str) -> dict[str, Any]:
        if model_id != name:
            raise Refused(404, f"There is no model {model_id!r}; this server has {name!r}.", "model_not_found", "model")
        return about

    return app
