"""Ask vLLM's server at one URL or several, by its completions API with ``prompt_embeds``.

Notable: requests go to the URL that has the fewest of ours; one that nobody answers goes to the next, as long as none
of its tokens came. The server has to be started with ``--enable-prompt-embeds``.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllm.engines.base import Engine, EngineError, Request, Source
from mllm.engines.http import HTTPError, opened, read_json
from mllm.engines.options import check_options, rank_for, sampling_of
from mllm.engines.probe import TEXT, check_embeddings
from mllm.errors import MLLMError
from mllm.hub.fingerprints import fingerprint
from mllm.lms.decoding import Decoding

START = "vllm serve {name} --enable-prompt-embeds"
BROKEN = (OSError, TimeoutError, ValueError, EOFError)  # of a connection, or of what is no answer of an engine
BUSY = 429  # a status; from 500 on, too, the same request may succeed later


class AtURLs(Engine):
    """vLLM's servers; all have the same language model.

    Args:
        urls: ``http://host:8000``, one or several.
        key: the servers' API key; None: that of the variable ``VLLM_API_KEY``, if there is one.

    Raises:
        MLLMError: no engine answers at one of them.
    """

    def __init__(self, urls: Sequence[str], key: str | None = None) -> None:
        self._urls = [str(url).rstrip("/").removesuffix("/v1") for url in urls]
        for url in self._urls:
            if not url.startswith(("http://", "https://")):
                raise MLLMError(f"The engine's URL is {url!r}: expected http://HOST:PORT or https://HOST.")
        self.label = ", ".join(self._urls)
        super().__init__()
        self._key = key or os.environ.get("VLLM_API_KEY") or None
        self._in_use: Counter[str] = Counter()
        self._model = ""
        for url in self._urls:
            self.run(self._models(url))

    async def start(self, source: Source) -> int | None:
        """Compare the language model at each URL with ours; see `mllm.engines.base.Engine.start`."""
        lengths = []
        for url in self._urls:
            models = await self._models(url)
            base = next((entry for entry in models if not entry.get("parent")), models[0])
            _check_identity(url, base, source)
            await self._check_vocabulary(url, base, source)
            model = str(base["id"]) if source.lora is None else await self._lora(url, models, source, source.lora)
            if self._model and model != self._model:
                raise MLLMError(f"{url} serves {model!r}, and {self._urls[0]} {self._model!r}: give both one name.")
            self._model = model
            lengths += [int(base["max_model_len"])] if base.get("max_model_len") else []
        for url in self._urls:
            await check_embeddings(_OneOf(self, url), source)
        return min(lengths) if lengths else None

    def check(self, decoding: Decoding) -> None:
        """Refuse options that vLLM does not have."""
        check_options(decoding)

    async def stream(self, request: Request) -> AsyncIterator[list[int]]:
        """Yield an answer's new ids as they are generated."""
        failed: dict[str, str] = {}
        while len(failed) < len(self._urls):
            url = min((url for url in self._urls if url not in failed), key=self._in_use.__getitem__)
            begun = False
            try:
                async with contextlib.aclosing(self.stream_of(url, request)) as answer:
                    async for ids in answer:
                        begun = True
                        yield ids
                return
            except EngineError as error:
                if begun:
                    raise
                failed[url] = str(error)
        raise EngineError(" ".join(failed.values()))

    async def stream_of(self, url: str, request: Request) -> AsyncGenerator[list[int], None]:
        """Yield an answer's new ids of one URL."""
        prompt = request.prompt
        body = {
            "model": self._model,
            **({"prompt": prompt} if isinstance(prompt, list) else {"prompt_embeds": encoded(prompt)}),
            **sampling_of(request.decoding, request.ends),
            "stream": True,
            "return_token_ids": True,
        }
        self._in_use[url] += 1
        try:
            async with opened(f"{url}/v1/completions", body, self._key) as lines:
                async for line in lines:
                    if line.startswith("data:") and (ids := _ids_of(line)) is not None:
                        yield ids
                    elif line.startswith("data: [DONE]"):
                        return
            raise ConnectionError("the answer ended before its end")
        except HTTPError as error:
            if error.status == BUSY or error.status >= 500:
                raise EngineError(f"The engine at {url} does not answer: {error}.") from None
            raise MLLMError(f"The engine at {url} refuses a request: {error}") from None
        except BROKEN as error:
            raise EngineError(f"The engine at {url} does not answer: {_reason(error)}.") from None
        finally:
            self._in_use[url] -= 1

    async def _models(self, url: str) -> list[dict[str, Any]]:
        """Return the models that a URL has.

        Raises:
            MLLMError: there is no engine, or it has none.
        """
        try:
            models = [dict(entry) for entry in (await read_json(f"{url}/v1/models", key=self._key))["data"]]
            if not models or not all(entry["id"] for entry in models):
                raise ValueError("its /v1/models lists no model")
            return models
        except HTTPError as error:
            raise MLLMError(f"At {url} is no engine: its /v1/models answers {error}. {_advice(url)}") from None
        except (*BROKEN, KeyError, TypeError) as error:
            raise EngineError(f"No engine answers at {url}: {_reason(error)}. {_advice(url)}") from None

    async def _check_vocabulary(self, url: str, base: dict[str, Any], source: Source) -> None:
        """Compare the ids of a text.

        Raises:
            MLLMError: they differ.
        """
        body = {"model": base["id"], "prompt": TEXT, "add_special_tokens": False}
        try:
            ids = (await read_json(f"{url}/tokenize", body, self._key))["tokens"]
        except HTTPError as error:
            if error.status == 404:  # the route is turned off; the embeddings are compared
                return
            raise MLLMError(f"The engine at {url} does not tokenize a text: {error}") from None
        except (*BROKEN, KeyError, TypeError) as error:
            raise EngineError(f"The engine at {url} does not answer: {_reason(error)}.") from None
        if ids != source.tokenize(TEXT):
            raise MLLMError(
                f"The engine at {url} has the language model {base['id']}, of another vocabulary than this run's, "
                f"{source.name}. Start it with that: {START.format(name=source.name)}"
            )

    async def _lora(self, url: str, models: Sequence[dict[str, Any]], source: Source, folder: Path) -> str:
        """Return the name of a run's LoRA at a URL, which is loaded there if it is not.

        Raises:
            MLLMError: the engine cannot load it.
        """
        if any(entry["id"] == folder.name for entry in models):
            return folder.name
        body = {"lora_name": folder.name, "lora_path": str(folder)}
        try:
            async with opened(f"{url}/v1/load_lora_adapter", body, self._key):
                return folder.name
        except (HTTPError, *BROKEN) as error:
            raise MLLMError(
                f"The engine at {url} does not have the run's LoRA, and does not load it ({_reason(error)}). Start it "
                f"with --enable-lora --max-lora-rank {rank_for(source.rank)} --lora-target-modules "
                f"{' '.join(source.targets)} --lora-modules {folder.name}={folder}, a folder that is written already."
            ) from None


class _OneOf:
    """One URL of several, to be compared with ours."""

    def __init__(self, engine: AtURLs, url: str) -> None:
        self.label, self._engine = url, engine

    async def answer(self, request: Request) -> list[int]:
        """Return the ids of an answer."""
        return [token async for ids in self._engine.stream_of(self.label, request) for token in ids]


def encoded(embeds: Tensor) -> str:
    """Return embeddings ``(T, D_lm)`` as vLLM's API takes them: a tensor's file in base64."""
    buffer = io.BytesIO()
    torch.save(embeds.contiguous().clone(), buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def _check_identity(url: str, base: dict[str, Any], source: Source) -> None:
    """Compare the weights' fingerprint, where the engine's folder can be read here; else embeddings are compared.

    Raises:
        MLLMError: it is another language model.
    """
    root = str(base.get("root") or base["id"])
    if os.path.isdir(root) and fingerprint(root) != source.fingerprint:
        raise MLLMError(
            f"The engine at {url} has other weights than this run's language model, {source.name}: those of {root}. "
            f"Start it with {START.format(name=source.folder)}"
        )


def _ids_of(line: str) -> list[int] | None:
    """Return the ids of a server-sent event; None: it has none.

    Raises:
        ConnectionError: it is an error.
    """
    text = line.removeprefix("data:").strip()
    if text == "[DONE]":
        return None
    event = json.loads(text)
    if "error" in event:
        raise ConnectionError(str(event["error"])[:300])
    ids = [token for choice in event.get("choices", ()) for token in choice.get("token_ids") or ()]
    return ids or None


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__).strip().rstrip(".")


def _advice(url: str) -> str:
    return f"Start one there ({START.format(name='MODEL')}), or give another URL."
