"""Requests as OpenAI's clients write them, and refusals by name in OpenAI's error schema."""

from __future__ import annotations

import http.client
import json
import re
from typing import Any

import openai
import pytest

from mllm.testing import tiny_image

IMAGE = tiny_image(1)


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
        "n",
        "stream",
        "temperature",
        "top_p",
        "seed",
        "stop",
        "stream_options",
        "max_completion_tokens",
        "model",
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
        pytest.param(lambda url: {"url": wrapped(url)}, id="line-breaks"),
        pytest.param(lambda url: {"url": f"{url}\n"}, id="newline-last"),
        pytest.param(lambda url: {"url": url.rstrip("=")}, id="no-padding"),
        pytest.param(lambda url: {"url": head_of(url, "data:;base64")}, id="no-media-type"),
        pytest.param(lambda url: {"url": head_of(url, "data:image/png;charset=utf-8;base64")}, id="charset"),
        pytest.param(lambda url: url, id="plain-string"),
        pytest.param(lambda url: {"url": head_of(url, "Data:image/png;Base64")}, id="capitals"),
    ],
)
def test_an_image_in_every_form_of_a_data_url(client, url, expected, image_url):
    assert client.answer(about(image_url(url))) == expected


USER: Any = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    "messages",
    [
        pytest.param(
            [{"role": "developer", "content": "brief"}, USER],
            id="developer",
        ),
        pytest.param(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}, USER],
            id="assistant-null",
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
    ("settings", "expected"),
    [
        pytest.param({"stop": ["a", "b", "c", "d"]}, 200, id="four-stops"),
        pytest.param({"max_tokens": 0}, 400, id="no-tokens"),
        pytest.param({"top_p": 0}, 200, id="top_p-0"),
        pytest.param({"temperature": 0, "seed": 2**63 - 1}, 200, id="seed-63-bits"),
        pytest.param({"temperature": 1, "seed": -1}, 200, id="seed-negative"),
        pytest.param({"temperature": 1, "seed": 2**70}, 400, id="seed-70-bits"),
    ],
)
def test_settings_at_the_edge_of_openais_schema(client, settings, expected):
    status, body = client.ask("hi", **settings)
    assert status == expected, body


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("", 200, id="empty"),
        pytest.param("hi \ud800", 400, id="lone-surrogate"),
        pytest.param("hi\x00there", 200, id="NUL"),
    ],
)
def test_a_text_of_odd_characters_is_answered_or_refused(client, text, expected):
    status, body = client.ask(text)
    assert status == expected, body


@pytest.mark.parametrize("source", ["data:image/svg+xml;utf8,<svg/>", "bare-base64"])
def test_what_is_no_image_is_refused_with_a_message(client, url, source):
    status, body = client.ask(about({"url": url.partition(",")[2] if source == "bare-base64" else source}))
    assert status == 400
    assert json.loads(body)["error"]["message"]


def content(client: Any, messages: list[Any], **settings: Any) -> str:
    status, body = client.post({"messages": messages, "max_tokens": 5, **settings})
    assert status == 200, body
    return str(json.loads(body)["choices"][0]["message"]["content"])


def test_developer_is_the_role_system(client):
    roles = [content(client, [{"role": role, "content": "brief"}, USER]) for role in ("developer", "system")]
    assert roles[0] == roles[1] != content(client, [USER])


def test_parts_are_read_in_every_role_and_a_refusal_is_a_text(client):
    def parts(text: str, kind: str = "text") -> list[dict[str, str]]:
        return [{"type": kind, kind: text}]

    plain = [{"role": "system", "content": "brief"}, USER, {"role": "assistant", "content": "no"}, USER]
    split = [
        {"role": "system", "content": parts("brief")},
        {"role": "user", "content": parts("hi")},
        {"role": "assistant", "content": parts("no", "refusal")},
        {"role": "user", "content": parts("hi")},
    ]
    assert content(client, plain) == content(client, split)


IGNORED = {"user": "a", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "parallel_tool_calls": False}
NEUTRAL = {
    "n": 1,
    "logprobs": False,
    "top_logprobs": 0,
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "none",
    "logit_bias": {},
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "modalities": ["text"],
    "stream_options": {"include_usage": False},
}


def test_fields_without_an_effect_are_accepted(client):
    assert content(client, [USER], **IGNORED, **NEUTRAL) == content(client, [USER])


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format"),
        ({"tools": [TOOL]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty"),
        ({"logit_bias": {"5": 100}}, "logit_bias"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "a" * 257}, "stop"),
        ({"stop": 3}, "stop"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"extra_body": {"top_k": 3}}, "top_k"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
    ],
)
def test_what_is_not_done_is_refused_by_name_in_openais_schema(client, settings, param):
    with (
        openai.OpenAI(base_url=f"http://127.0.0.1:{client.port}/v1", api_key="none", max_retries=0) as api,
        pytest.raises(openai.BadRequestError) as caught,
    ):
        api.chat.completions.create(model="tiny", messages=[USER], **settings)
    error = caught.value
    assert (error.status_code, error.param, error.type) == (400, param, "invalid_request_error")
    assert error.code == "invalid_request" and param in error.message


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "tool", "content": "x", "tool_call_id": "1"}, "needs a role"),
        ({"role": "user"}, "content"),
        ({"role": "user", "content": None}, "content"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "a text or an image_url"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "a text or an image_url"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": 3}]}, "a text or an image_url"),
        ({"role": "user", "content": ["hi"]}, "a text or an image_url"),
        ({"role": "user", "content": about("http://[::1")}, "is not valid"),
        ({"role": "user", "content": about("/x%00")}, "does not read|is not valid"),
        ({"role": "user", "content": about("/" + "x" * 10_000)}, "does not read|cannot be read"),
        ({"role": "user", "content": about("data:image/png;base64,AAAA")}, "not a readable image"),
    ],
)
def test_a_message_that_cannot_be_read_is_refused(client, message, reason):
    status, body = client.post({"messages": [message]})
    error = json.loads(body)["error"]
    assert (status, error["param"]) == (400, "messages")
    assert re.search(reason, error["message"]), error


def test_an_assistants_tool_call_is_refused(client):
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {}}]}
    status, body = client.post({"messages": [USER, call, USER]})
    assert status == 400 and "tool_calls" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"3", b"{", b'{"messages": NaN}', b'{"temperature": Infinity}', b"[" * 100_000, b"\xff\xfe{", b"null"],
)
def test_a_body_that_is_no_request_is_refused(client, body):
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=30)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    error = json.loads(answer.read())["error"]
    connection.close()
    assert (answer.status, error["type"], error["code"]) == (400, "invalid_request_error", "invalid_request")


def test_a_model_is_found_by_its_id(client):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{client.port}/v1", api_key="none", max_retries=0) as api:
        assert api.models.retrieve("tiny").id == "tiny"
        assert [model.id for model in api.models.list()] == ["tiny"]
        for other in ("gpt-4", "org/tiny", "tiny/x"):
            with pytest.raises(openai.NotFoundError) as caught:
                api.models.retrieve(other)
            assert caught.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError) as caught:
            api.embeddings.create(model="tiny", input="a")
        assert "/v1/embeddings" in caught.value.message


@pytest.mark.parametrize("temperature", [0, 1e-40, 1e-7])
def test_a_temperature_near_0_is_greedy(client, temperature):
    assert content(client, [USER], temperature=temperature, seed=3) == content(client, [USER])


def test_top_p_of_0_is_greedy(client):
    assert content(client, [USER], top_p=0, temperature=1, seed=3) == content(client, [USER])
