"""One request's failure does not reach the other requests of its batch: they get the answers that they get alone."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
import torch
from PIL import Image

from mllm.testing import tiny_image

ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}\n{% endfor %}"
)
SIZE = (23, 17)  # of the image at which the encoder fails


@contextlib.contextmanager
def held(model: Any) -> Iterator[threading.Event]:
    """Let the language model wait, until the block ends, in the first forward pass of another thread."""
    running, gate = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        running.set()
        assert gate.wait(timeout=60)

    handle = model.lm.model.register_forward_pre_hook(wait)
    try:
        yield running
    finally:
        handle.remove()
        gate.set()


def good(url: str) -> list[dict[str, Any]]:
    """Return requests of every kind; one is sampled."""
    image = {"type": "image_url", "image_url": {"url": url}}
    text = {"type": "text", "text": "what is it?"}
    return [
        {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4},
        {"messages": [{"role": "user", "content": [image, text]}], "max_tokens": 6},
        {"messages": [{"role": "user", "content": "hello you"}], "max_tokens": 7, "temperature": 1.2, "seed": 5},
    ]


def answered(client: Any, body: dict[str, Any], *, stream: bool) -> str:
    """Return the text that answers a request, whole or in pieces."""
    with openai.OpenAI(base_url=f"http://127.0.0.1:{client.port}/v1", api_key="none", max_retries=0) as api:
        answer: Any = api.chat.completions.create(model="tiny", stream=stream, **body)
        if stream:
            return "".join(event.choices[0].delta.content or "" for event in answer)
        return str(answer.choices[0].message.content)


def together(model: Any, client: Any, bodies: list[dict[str, Any]], bad: dict[str, Any]) -> tuple[list[str], int, str]:
    """Send a bad request between good ones, all in one batch: the good answers, and the bad one's status and body."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        with held(model) as running:
            first = pool.submit(client.ask, "first")  # what comes while it runs is decoded together
            assert running.wait(timeout=60)
            before = [pool.submit(answered, client, body, stream=False) for body in bodies]
            refused = pool.submit(client.post, bad)
            after = [pool.submit(answered, client, body, stream=True) for body in bodies]
            time.sleep(0.5)  # until all of them wait
        assert first.result()[0] == 200
        return [answer.result() for answer in (*before, *after)], *refused.result()


def user(text: str, *images: str, **settings: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}], **settings}


TURNS = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]


@pytest.mark.parametrize(
    ("family", "template", "bad"),
    [
        pytest.param("bytes", None, user("x", temperature=1, seed=2**70), id="seed-70-bits"),
        pytest.param("gpt2", None, user("x" * 216, max_tokens=100), id="past-the-context"),
        pytest.param("bytes", None, user("x" * 216, max_tokens=100), id="past-a-rotary-context"),
        pytest.param("bytes", None, user("x" * 5000), id="prompt-past-the-context"),
        pytest.param("bytes", None, user("x", stop=["\ud800"]), id="stop-of-a-lone-surrogate"),
        pytest.param("bytes", None, user("\udfff"), id="text-of-a-lone-surrogate"),
        pytest.param("bytes", None, user("x", "data:image/png;base64,iVBORw0KGgo="), id="truncated-image"),
        pytest.param("bytes", None, user("x", "http://[::1"), id="URL"),
        pytest.param("bytes", None, user("x", n=3), id="n"),
        pytest.param("bytes", ALTERNATING, {"messages": TURNS}, id="template-that-raises"),
    ],
)
def test_a_bad_request_does_not_reach_those_of_its_batch(model_of, serve, data_url, family, template, bad):
    model = model_of(family, template)
    client, bodies = serve(model), good(data_url(tiny_image(1)))
    alone = [answered(client, body, stream=False) for body in bodies]
    texts, status, body = together(model, client, bodies, bad)
    assert texts == [*alone, *alone]
    assert status == 400 and json.loads(body)["error"]["message"]


@contextlib.contextmanager
def failing(model: Any, where: str) -> Iterator[None]:
    """Let the model fail at one request: at its image, in its text, or after it has generated some tokens."""
    marked = model.lm.tokenizer("~", add_special_tokens=False).input_ids[-1]
    steps: list[int] = []

    def fail_at_an_image(module: Any, args: Any, options: Any) -> None:
        raise RuntimeError("an image")

    def fail_in_a_text(module: Any, args: Any, output: torch.Tensor) -> None:
        if (args[0] == marked).any():
            steps[:] = [0]
            if where == "text":
                raise RuntimeError("a text")

    def fail_later(*_: Any) -> None:
        if steps:
            steps[0] += 1
            if steps[0] == 4:
                steps.clear()
                raise RuntimeError("a step")

    prepared = model.encoder.prepared

    def prepares(images: Any) -> Any:
        if any(image.size == SIZE for image in images):
            raise RuntimeError("an image")
        return prepared(images)

    handles = [model.lm.model.get_input_embeddings().register_forward_hook(fail_in_a_text)]
    if where == "step":
        handles.append(model.lm.model.register_forward_pre_hook(fail_later))
    model.encoder.prepared = prepares
    try:
        yield
    finally:
        del model.encoder.prepared
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("where", ["image", "text", "step"])
def test_a_failure_of_the_model_reaches_only_the_request_that_causes_it(
    model_of: Callable[..., Any], serve: Callable[[Any], Any], data_url: Callable[..., str], where: str
) -> None:
    model = model_of()
    client, bodies = serve(model), good(data_url(tiny_image(1)))
    alone = [answered(client, body, stream=False) for body in bodies]
    bad = user("x", data_url(Image.new("RGB", SIZE))) if where == "image" else user("~", max_tokens=9)
    with failing(model, where):
        texts, status, body = together(model, client, bodies, bad)
        assert texts == [*alone, *alone]
        assert status == 500 and json.loads(body)["error"]["code"] == "failed"
    assert client.post(bad)[0] == 200
