"""Requests as OpenAI's clients write them, and requests that must not harm those beside them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import threading
import time
from typing import Any

import pytest

from mllm.testing import tiny_image

IMAGE = tiny_image(1)


def planned(clause: str) -> pytest.MarkDecorator:
    return pytest.mark.xfail(
        strict=True, raises=AssertionError, reason=f"Right with the parts that people bring: {clause}"
    )


null = planned("a field of OpenAI's schema that is null is as if it were left out")
data_urls = planned("data URLs as OpenAI's clients write them")
no_500 = planned("a request that cannot be decoded is refused with status 400")
beside = planned("one request's failure does not reach the other requests of its batch")


@pytest.fixture(scope="module")
def client(model_of, serve):
    return serve(model_of())


@pytest.fixture(scope="module")
def url(data_url) -> str:
    """The image as a data URL, with padding."""
    written = data_url(IMAGE)
    assert written.endswith("=")
    return str(written)


def about(image_url: Any) -> list[dict[str, Any]]:
    """Return the content of a message about an image."""
    return [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": image_url}]


@pytest.fixture(scope="module")
def expected(client, url) -> str:
    """What the model answers to the plainest form of the request."""
    return str(client.answer(about({"url": url})))


@pytest.mark.parametrize(
    "field",
    [
        pytest.param("n", marks=null),
        pytest.param("stream", marks=null),
        "temperature",
        "top_p",
        "seed",
        "stop",
        "stream_options",
        "max_completion_tokens",
        pytest.param("model", marks=null),
        "presence_penalty",
        "logprobs",
        "tools",
    ],
)
def test_a_field_that_is_null_is_as_if_it_were_left_out(client, url, expected, field):
    assert client.answer(about({"url": url}), **{field: None}) == expected


def test_max_completion_tokens_beside_max_tokens_that_is_null(client, url, expected):
    assert client.answer(about({"url": url}), max_tokens=None, max_completion_tokens=3) == expected


def head_of(url: str, head: str) -> str:
    """Return a data URL with another head."""
    return f"{head},{url.partition(',')[2]}"


def wrapped(url: str) -> str:
    """Return a data URL whose base64 is broken into lines of 76 characters, as MIME does."""
    head, _, body = url.partition(",")
    return f"{head}," + "\r\n".join(body[start : start + 76] for start in range(0, len(body), 76))


@pytest.mark.parametrize(
    "image_url",
    [
        pytest.param(lambda url: {"url": url, "detail": "low"}, id="detail"),
        pytest.param(lambda url: {"url": wrapped(url)}, id="line-breaks", marks=data_urls),
        pytest.param(lambda url: {"url": f"{url}\n"}, id="newline-last", marks=data_urls),
        pytest.param(lambda url: {"url": url.rstrip("=")}, id="no-padding", marks=data_urls),
        pytest.param(lambda url: {"url": head_of(url, "data:;base64")}, id="no-media-type"),
        pytest.param(lambda url: {"url": head_of(url, "data:image/png;charset=utf-8;base64")}, id="charset"),
        pytest.param(lambda url: url, id="plain-string", marks=data_urls),
        pytest.param(lambda url: {"url": head_of(url, "Data:image/png;Base64")}, id="capitals", marks=data_urls),
    ],
)
def test_an_image_in_every_form_of_a_data_url(client, url, expected, image_url):
    assert client.answer(about(image_url(url))) == expected


USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    "messages",
    [
        pytest.param(
            [{"role": "developer", "content": "brief"}, USER],
            id="developer",
            marks=planned("OpenAI's role developer is the role system"),
        ),
        pytest.param(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}, USER],
            id="assistant-null",
            marks=planned("an assistant's turn of OpenAI's schema has a content that is null"),
        ),
        pytest.param([{**USER, "name": "bob"}], id="name"),
    ],
)
def test_a_message_as_openais_clients_write_it(client, messages):
    status, body = client.post({"messages": messages, "max_tokens": 3})
    assert status == 200, body


def test_an_empty_text_beside_an_image(client, url):
    client.answer([{"type": "text", "text": ""}, {"type": "image_url", "image_url": {"url": url}}])


@pytest.mark.parametrize(
    ("settings", "statuses"),
    [
        pytest.param({"stop": ["a", "b", "c", "d"]}, [200], id="four-stops"),
        pytest.param({"max_tokens": 0}, [200, 400], id="no-tokens"),
        pytest.param({"top_p": 0}, [200], id="top_p-0", marks=planned("top_p of 0, which OpenAI's schema allows")),
        pytest.param({"temperature": 0, "seed": 2**63 - 1}, [200], id="seed-63-bits"),
        pytest.param({"temperature": 1, "seed": -1}, [200], id="seed-negative"),
        pytest.param({"temperature": 1, "seed": 2**70}, [200, 400], id="seed-70-bits", marks=no_500),
    ],
)
def test_settings_at_the_edge_of_openais_schema(client, settings, statuses):
    status, body = client.ask("hi", **settings)
    assert status in statuses, body


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("hi \ud800", id="lone-surrogate", marks=no_500),
        pytest.param("hi\x00there", id="NUL"),
    ],
)
def test_a_text_of_odd_characters_is_answered_or_refused(client, text):
    status, body = client.ask(text)
    assert status in (200, 400), body


@pytest.mark.parametrize("source", ["data:image/svg+xml;utf8,<svg/>", "bare-base64"])
def test_what_is_no_image_is_refused_with_a_message(client, url, source):
    status, body = client.ask(about({"url": url.partition(",")[2] if source == "bare-base64" else source}))
    assert status == 400
    assert json.loads(body)["error"]["message"]


@contextlib.contextmanager
def held(model: Any) -> Any:
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


@pytest.mark.parametrize(
    ("family", "bad"),
    [
        pytest.param("bytes", {"content": "x", "temperature": 1, "seed": 2**70}, id="seed-70-bits", marks=beside),
        pytest.param("gpt2", {"content": "x" * 216, "max_tokens": 100}, id="past-the-context", marks=beside),
        pytest.param("bytes", {"content": "x", "stop": ["\ud800"]}, id="stop-of-a-lone-surrogate", marks=beside),
        pytest.param("bytes", {"content": " "}, id="empty-text"),
    ],
)
def test_a_bad_request_does_not_reach_those_of_its_batch(model_of, serve, family, bad):
    model = model_of(family)
    client = serve(model)
    expected = client.ask("hello")
    assert expected[0] == 200
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        with held(model) as running:
            first = pool.submit(client.ask, "first")  # what comes while it runs is decoded together
            assert running.wait(timeout=60)
            together = pool.submit(client.ask, **bad)
            beside = [pool.submit(client.ask, "hello") for _ in range(2)]
            time.sleep(0.3)  # until all three wait
        assert first.result()[0] == 200
        together.result()
        answers = [answer.result() for answer in beside]
    assert [status for status, _ in answers] == [200, 200], answers
    texts = {json.loads(body)["choices"][0]["message"]["content"] for _, body in (expected, *answers)}
    assert len(texts) == 1
