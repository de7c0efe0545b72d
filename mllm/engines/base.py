"""Define the contract of an engine: it gets prompts' embeddings with decoding options, and gives tokens, streamed.

The encoder, the connector and the language model's embedding table are here; the layers are the engine's. An engine is
found by its name in the registry group ``engines``.

Shapes: T tokens of a prompt, D_lm the width of the embeddings.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from mllm.errors import MLLMError
from mllm.lms.decoding import Decoding

Result = TypeVar("Result")
POLL = 0.05  # seconds after which a request that waits for a token looks whether it was cancelled


class EngineError(MLLMError):
    """An engine does not answer: it ended, or it is not there. The same request may succeed later."""


@dataclass(frozen=True)
class Source:
    """The language model whose layers an engine runs.

    Attributes:
        name: as the recipe names it.
        folder: where its files are, or its Hub id.
        dtype: of the embeddings, and of the layers.
        context: the context length of its configuration; None: it has no limit.
        fingerprint: of its weights (`mllm.hub.fingerprints.fingerprint`).
        tokenize: returns the ids of a text, without added special tokens.
        embed: returns the embeddings ``(T, D_lm)`` of ids.
        lora: a folder with the files of a LoRA of peft, which is applied to every request; None: there is none.
        rank: of the LoRA.
        targets: the names of the layers that it changes.
        trust_remote_code: whether code of the model's repository may run.
    """

    name: str
    folder: str
    dtype: str
    context: int | None
    fingerprint: str
    tokenize: Callable[[str], list[int]]
    embed: Callable[[Sequence[int]], Tensor]
    lora: Path | None = None
    rank: int = 0
    targets: tuple[str, ...] = ()
    trust_remote_code: bool = False


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt.

    Attributes:
        prompt: its embeddings ``(T, D_lm)``, or its ids.
        decoding: what it is decoded with, ``max_new_tokens`` included.
        ends: the ids that end an answer.
        put: is called with new ids as they are generated, from a thread of the engine.
    """

    prompt: Tensor | list[int]
    decoding: Decoding
    ends: Sequence[int]
    put: Callable[[list[int]], Any]


class Engine(ABC):
    """Runs a language model's layers: ``mllm.load(run, engine="vllm")``.

    Requests are answered at the same time, as many as the engine likes. Their coroutines run in one thread.

    Attributes:
        label: names the engine in messages.
        in_flight: requests for which an evaluation keeps the engine busy.
    """

    label: str
    in_flight = 256

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name=f"engine {self.label}", daemon=True).start()

    @abstractmethod
    async def start(self, source: Source) -> int | None:
        """Load the layers, or find where they are loaded, and return the context length there; None: it has no limit.

        Raises:
            MLLMError: they are another language model's, or cannot be loaded.
        """

    @abstractmethod
    def check(self, decoding: Decoding) -> None:
        """Refuse options that the engine does not have.

        Raises:
            MLLMError: it is named.
        """

    @abstractmethod
    def stream(self, request: Request) -> AsyncIterator[list[int]]:
        """Yield an answer's new ids, its end included, as they are generated; closing it cancels the request.

        Raises:
            EngineError: the engine ended, or does not answer.
        """

    def open(self, source: Source) -> int | None:
        """Start, and wait until requests can be submitted; see `start`."""
        return self.run(self.start(source))

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine in the engine's thread, and return its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def submit(self, request: Request) -> Future[list[int]]:
        """Queue a request, and return a future of its answer's ids; one that is cancelled has those until then."""
        return asyncio.run_coroutine_threadsafe(self.answer(request), self._loop)

    async def answer(self, request: Request) -> list[int]:
        """Return the ids of a request's answer, and pass them on as they come."""
        ids: list[int] = []
        stream: Any = self.stream(request)
        cancelled = request.decoding.cancelled or (lambda: False)
        async with contextlib.aclosing(stream):
            while not cancelled():
                step = asyncio.ensure_future(anext(stream, None))
                while not (await asyncio.wait({step}, timeout=POLL))[0]:
                    if cancelled():
                        step.cancel()
                        await asyncio.wait({step})
                        return ids
                if (new := step.result()) is None:
                    break
                ids += new
                request.put(new)
        return ids
