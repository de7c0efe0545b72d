"""Shared by the cases: tiny parts as people bring them, and the ways in which they are used."""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import mllm
from mllm.prompts.batch import Encoded, encode
from mllm.prompts.messages import checked_messages, rendered, turns
from mllm.testing import LM_FAMILIES, tiny_lm

VISUAL_TOKENS = 4


@pytest.fixture(scope="session")
def encoder(tiny_parts: tuple[str, str]) -> str:
    """The folder of a tiny encoder."""
    return tiny_parts[0]


@pytest.fixture(scope="session")
def lm_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Return a function that saves a tiny language model of a family (``bytes``: without BOS), and returns its folder.

    It takes a function that changes the tokenizer in place, and attributes that are set on it.
    """

    def folder(
        family: str = "bytes",
        change: Callable[[Any], Any] | None = None,
        template: str | None = None,
        **attributes: Any,
    ) -> str:
        place = tmp_path_factory.mktemp(family)
        saved = tiny_lm(place) if family == "bytes" else LM_FAMILIES[family](place)
        tokenizer = AutoTokenizer.from_pretrained(place)
        if change is not None:
            change(tokenizer)
        tokenizer.chat_template = template
        for name, value in attributes.items():
            setattr(tokenizer, name, value)
        tokenizer.save_pretrained(place)
        return saved

    return folder


@pytest.fixture(scope="session")
def assemble(encoder: str) -> Callable[..., Any]:
    """Return a function that joins the tiny encoder and a language model's folder."""

    def assembled(lm: str, **options: Any) -> Any:
        return mllm.assemble(encoder, lm, {"type": "linear", "tokens": VISUAL_TOKENS}, **options)

    return assembled


@pytest.fixture(scope="session")
def model_of(assemble: Callable[..., Any], lm_folder: Callable[..., str]) -> Callable[..., Any]:
    """Return a function of a family and, where the model uses one, its own chat template; each model is made once."""

    @functools.cache
    def model(family: str = "bytes", template: str | None = None) -> Any:
        options = {"prompt": {"chat": "own"}} if template else {}
        return assemble(lm_folder(family, template=template), **options)

    return model


@pytest.fixture(scope="session")
def prompt_of() -> Callable[[Any, Sequence[Any]], list[Any]]:
    """Return a function of a model and messages: the interleaved prompt that the model answers."""
    return lambda model, messages: turns(model, checked_messages(messages))


@pytest.fixture(scope="session")
def example_of() -> Callable[[Any, Sequence[Any]], list[Any]]:
    """Return a function of a model and messages: the interleaved prompt with targets that the model is trained on."""
    return lambda model, messages: rendered(checked_messages(messages), model.spec.prompt, model.lm, learn=True)


@pytest.fixture(scope="session")
def encoded() -> Callable[[Any, Sequence[Any]], Encoded]:
    """Return a function of a model and an interleaved prompt: its ids and labels."""
    return lambda model, pieces: encode(pieces, lm=model.lm, num_visual=VISUAL_TOKENS)


@pytest.fixture(scope="session")
def as_text() -> Callable[[Sequence[Any]], str]:
    """Return a function that writes an interleaved prompt as one text, with ``<image>`` for an image."""

    def text(piece: Any) -> str:
        return str(piece if isinstance(piece, str) else getattr(piece, "text", "<image>"))

    return lambda pieces: "".join(map(text, pieces))


@dataclass
class Script:
    """What a language model generates whatever it is asked: these ids in order, the last one for ever.

    Attributes:
        tokens: how many it has generated.
    """

    ids: Sequence[int]
    tokens: int = 0

    def __call__(self, module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        """Replace the logits of a forward pass."""
        scripted = torch.zeros_like(logits)
        scripted[:, -1, self.ids[min(self.tokens, len(self.ids) - 1)]] = 9.0
        self.tokens += 1
        return scripted


@pytest.fixture(scope="session")
def scripted() -> Callable[..., Any]:
    """Return a context manager: inside it, a model's language model generates the given ids."""

    @contextlib.contextmanager
    def script(model: Any, *ids: int) -> Iterator[Script]:
        written = Script(ids)
        handle = model.lm.model.get_output_embeddings().register_forward_hook(written)
        try:
            yield written
        finally:
            handle.remove()

    return script


@dataclass(frozen=True)
class Client:
    """A client of a server on this machine."""

    port: int

    def post(self, body: dict[str, Any]) -> tuple[int, str]:
        """Return the status and the body of the answer to a request for a chat completion."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def ask(self, content: Any, **settings: Any) -> tuple[int, str]:
        """Return the status and the body of the answer to one user message."""
        return self.post({"messages": [{"role": "user", "content": content}], "max_tokens": 3, **settings})

    def answer(self, content: Any, **settings: Any) -> str:
        """Return the text that answers one user message."""
        status, body = self.ask(content, **settings)
        assert status == 200, body
        return str(json.loads(body)["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def serve(served: Callable[..., Any]) -> Iterator[Callable[[Any], Client]]:
    """Return a function that serves a model until the module ends, and returns a client."""
    with contextlib.ExitStack() as servers:
        clients: dict[int, Client] = {}

        def client(model: Any) -> Client:
            if id(model) not in clients:
                clients[id(model)] = Client(servers.enter_context(served(model)))
            return clients[id(model)]

        yield client


@pytest.fixture(scope="session")
def data_url() -> Callable[..., str]:
    """Return a function that writes a PIL image as a data URL."""

    def url(image: Any, kind: str = "PNG", **options: Any) -> str:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"

    return url
