"""Answer requests for chat completions, within budgets that all of them share.

A request passes these steps: its body is read (bytes), it gets a place, it is parsed, its images are read, it gets its
pixels, the images are decoded, it is queued and answered. Parsing and decoding are done one request at a time, so that
what they need beyond the result is needed once. When the client disconnects, all of it is given back at once.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from starlette.responses import Response

from mllm.errors import MLLMError
from mllm.model import Model
from mllm.serve.batcher import Batcher
from mllm.serve.budget import Budget, Share
from mllm.serve.entrance import Message, Receive, Send, busy, read_body, while_connected
from mllm.serve.fields import read_completion
from mllm.serve.metrics import Metrics
from mllm.serve.remote import Remote
from mllm.serve.requests import needs_remote, opened, pixels_of, prompt_of, with_images
from mllm.serve.responses import Events, respond
from mllm.serve.schema import Limits, invalid_request

Result = TypeVar("Result")
DOWNLOADS = 4  # requests whose images are read from hosts and folders at the same time


class Completions:
    """The route ``/v1/chat/completions``, an ASGI application.

    Args:
        model: the model.
        name: its id.
        limits: of requests.
        batcher: decodes them.
        metrics: counts them.
    """

    def __init__(self, model: Model, name: str, limits: Limits, batcher: Batcher, metrics: Metrics) -> None:
        self._model, self._name, self._limits = model, name, limits
        self._batcher, self._metrics = batcher, metrics
        self._remote = Remote(limits.hosts, limits.folders, limits.deadline)
        self._bodies, self._pixels = Budget(limits.bodies), Budget(limits.pixels)
        self._places = Budget(limits.batch + limits.waiting)
        self._in_turn, self._downloads = anyio.CapacityLimiter(1), anyio.CapacityLimiter(DOWNLOADS)
        metrics.watch(
            {
                "requests_in_progress": lambda: self._places.used,
                "body_bytes": lambda: self._bodies.used,
                "image_pixels": lambda: self._pixels.used,
            }
        )

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Answer a request."""
        metrics, limits = self._metrics, self._limits
        with self._bodies.share() as read, self._places.share() as place, self._pixels.share() as pixels:
            body = [await read_body(dict(scope["headers"]), receive, limits, read)]
            if body[0] is None:
                metrics.add("disconnects_total")
                return
            if not place.take(1):
                raise busy("too many requests wait already")
            with while_connected(receive, send, limits.deadline, metrics) as send_in_time:
                events = Events(self._batcher, metrics)
                try:
                    response = await self._response(body, read, pixels, events)
                    await response(scope, _nothing, send_in_time)
                finally:
                    events.cancel()

    async def _response(self, body: list[Any], read: Share, pixels: Share, events: Events) -> Response:
        """Return the response to a request; ``body`` is emptied, and ``read`` given back, as soon as may be."""
        limits = self._limits
        completion = await self._call(read_completion, body.pop())
        try:
            prompt = await self._prompt(completion.messages, read, pixels)
        except MLLMError as error:
            raise invalid_request(str(error), "messages") from None
        options, completion.messages = completion.decoding_options(limits.max_new_tokens), []
        read.give_back()
        try:
            job = await self._call(self._batcher.job, prompt, options, events.send, limits.max_new_tokens)
        except MLLMError as error:
            raise invalid_request(str(error)) from None
        events.submit(job)
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": self._name}
        return await respond(completion, events, head)

    async def _prompt(self, messages: list[dict[str, Any]], read: Share, pixels: Share) -> list[Any]:
        """Return messages as a prompt whose images are opened, when there is room for their pixels."""
        model, limits = self._model, self._limits
        remote = needs_remote(messages)
        if remote and not read.take(limits.body):
            raise busy("the images that are being read have too many bytes")
        read_images = partial(with_images, model, messages, self._remote, limits)
        checked = await self._call(read_images, limiter=self._downloads if remote else self._in_turn)
        prompt = await self._call(prompt_of, model, checked, limits)
        number = await self._call(pixels_of, model, prompt)
        if number > limits.pixels:
            raise MLLMError(
                f"The request's images have {number} pixels; at most {limits.pixels} are decoded. Make them smaller."
            )
        await pixels.wait(number)
        return await self._call(opened, model, prompt)

    async def _call(
        self, function: Callable[..., Result], *arguments: Any, limiter: anyio.CapacityLimiter | None = None
    ) -> Result:
        """Call a function in a thread; without a limiter when no other request is read."""
        return await anyio.to_thread.run_sync(partial(function, *arguments), limiter=limiter or self._in_turn)


async def _nothing() -> Message:
    """Wait for ever: the response need not watch the connection."""
    await anyio.sleep_forever()
    return {}
