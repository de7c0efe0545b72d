"""The server's limits: memory, deadlines, the queue, metrics, and its end."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import http.client
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from PIL import Image

import mllm
from mllm.__main__ import main
from mllm.errors import MLLMError
from mllm.lms.sampling import StopStrings
from mllm.media.images import MAX_SIDE, ImageBytes, declared_size
from mllm.serve.budget import Budget
from mllm.serve.connection import bind
from mllm.serve.schema import Limits
from mllm.testing import tiny_image, tiny_tokenizer


@pytest.fixture(scope="module")
def model(tiny_parts: tuple[str, str]) -> Any:
    return mllm.assemble(*tiny_parts, {"type": "linear", "tokens": 4})


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def ask(text: str = "hi", *urls: str, **settings: Any) -> dict[str, Any]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": [*images, {"type": "text", "text": text}]}], **settings}


def post(port: int, body: dict[str, Any] | bytes) -> tuple[int, dict[str, Any]]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("POST", "/v1/chat/completions", body if isinstance(body, bytes) else json.dumps(body))
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def metrics(port: int) -> dict[str, float]:
    """Return the values of /metrics by name and label."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        lines = answer.read().decode().splitlines()
    values = [line.rpartition(" ") for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r'[a-z_]+(\{status="\d+"\})?', name) for name, _, _ in values)  # Prometheus' text format
    return {name.removeprefix("mllm_"): float(value) for name, _, value in values}


def wait_for(port: int, **values: float) -> None:
    """Wait until metrics have these values."""
    until = time.monotonic() + 20
    while any(metrics(port)[name] != value for name, value in values.items()):
        assert time.monotonic() < until, metrics(port)
        time.sleep(0.02)


@contextlib.contextmanager
def sent(port: int, body: dict[str, Any], part: float = 1.0) -> Iterator[socket.socket]:
    """Send a request, or a part of its body, and disconnect when the block ends."""
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
        sock.sendall(head + data[: round(len(data) * part)])
        yield sock


@pytest.fixture
def gate(model: Any) -> Iterator[threading.Event]:
    """Every forward pass of the language model waits until this is set."""
    opened = threading.Event()
    handle = model.lm.model.register_forward_pre_hook(lambda *_: opened.wait(timeout=60) and None)
    try:
        yield opened
    finally:
        opened.set()
        handle.remove()


# Memory


def test_a_budget_is_shared_in_the_order_in_which_it_is_asked_for() -> None:
    async def scenario() -> list[str]:
        budget, order = Budget(10), list[str]()

        async def take(name: str, amount: int) -> None:
            await budget.wait(amount)
            order.append(name)

        assert budget.take(8) and not budget.take(3)
        tasks = [asyncio.ensure_future(take(*each)) for each in (("large", 9), ("gone", 5), ("small", 1))]
        await asyncio.sleep(0)
        assert not budget.take(1)  # though it is left: the large one came before
        tasks[1].cancel()
        budget.give_back(8)
        await asyncio.wait(tasks)
        assert budget.used == 10
        budget.give_back(10)
        return order

    assert asyncio.run(scenario()) == ["large", "small"]


def test_a_request_that_is_cancelled_when_its_turn_has_come_gives_it_back() -> None:
    async def scenario() -> int:
        budget = Budget(10)
        assert budget.take(10)
        task = asyncio.ensure_future(budget.wait(4))
        await asyncio.sleep(0)
        budget.give_back(10)  # the task's turn has come, and it has not run yet
        task.cancel()
        await asyncio.wait([task])
        return budget.used

    assert asyncio.run(scenario()) == 0


def test_images_wait_for_the_pixels_of_other_requests(model, gate, served):
    image = data_url(Image.new("RGB", (100, 100)))
    with served(model, pixels=25_000, batch=1) as port, concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(post, port, ask("x", image, max_tokens=2)) for _ in range(4)]
        wait_for(port, requests_in_progress=4, queue_length=1, image_pixels=20_000)  # two are not decoded yet
        gate.set()
        assert [answer.result()[0] for answer in answers] == [200] * 4
        wait_for(port, requests_in_progress=0, image_pixels=0, body_bytes=0)
        status, answer = post(port, ask("x", image, image, image))
        assert status == 400 and "30000 pixels; at most 25000" in answer["error"]["message"]


@pytest.mark.parametrize("size", [(1, MAX_SIDE + 1), (MAX_SIDE + 1, 1), (9000, 9000)])
def test_an_image_that_is_too_long_or_large_is_refused_by_its_header(model, monkeypatch, size, served):
    url = data_url(Image.new("1", size))
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("it was decoded"))
    with served(model) as port:
        status, answer = post(port, ask("x", url))
    assert status == 400 and f"{size[0]} x {size[1]} pixels" in answer["error"]["message"]


def test_the_declared_size_is_that_of_the_decoded_image(tmp_path):
    tiny_image(1, size=(30, 20)).save(tmp_path / "a.webp")
    data = (tmp_path / "a.webp").read_bytes()
    assert declared_size(ImageBytes(data, "a.webp")) == ImageBytes(data, "a.webp").open().size == (30, 20)


def test_bodies_of_all_requests_share_a_budget(model, served):
    large = ask("x" * 60_000)
    with served(model, body=100_000, bodies=200_000) as port, contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(sent(port, large, part=0.99))
        wait_for(port, requests_in_progress=0)
        until = time.monotonic() + 20
        while metrics(port)["body_bytes"] < 170_000 and time.monotonic() < until:
            time.sleep(0.02)
        status, answer = post(port, large)
        assert (status, answer["error"]["code"]) == (429, "busy")
        stack.close()
        wait_for(port, body_bytes=0)
        assert post(port, ask(max_tokens=1))[0] == 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (ask("x" * 60_000), "60000 characters; at most 16384"),  # 64 for each token of the context
        (b'{"messages": [' + b"[]," * 300_000 + b"[]]}", "brackets and commas"),
        (ask("x", *["data:,"] * 5000), "parts; at most"),
        (json.dumps({"messages": [3] * 100_000}).encode(), "messages"),
        (ask(stop="x" * 100_000), "stop"),
    ],
)
def test_what_is_far_too_long_is_refused_at_once(model, body, message, served):
    with served(model) as port:
        post(port, ask(max_tokens=1))
        started = time.monotonic()
        status, answer = post(port, body)
        assert time.monotonic() - started < 5
    assert status == 400 and message in answer["error"]["message"]


def test_a_long_text_is_refused_after_a_slice_of_it(model, monkeypatch, served):
    lengths: list[int] = []
    tokenize = type(model.lm).tokenize

    def counted(lm: Any, text: str, **options: Any) -> Any:
        lengths.append(len(text))
        return tokenize(lm, text, **options)

    monkeypatch.setattr(type(model.lm), "tokenize", counted)
    monkeypatch.setattr("mllm.serve.requests.TEXT_PER_TOKEN", 10_000)
    monkeypatch.setattr("mllm.serve.requests.SLICE", 1000)
    with served(model) as port:
        status, answer = post(port, ask("many words " * 40_000))
    assert status == 400 and "the context is 256 tokens" in answer["error"]["message"]
    assert sum(lengths) <= 1000


def test_a_token_that_is_empty_or_cannot_be_sent_is_refused():
    for token in ("", " ", "two words", "line\n", "é"):
        with pytest.raises(MLLMError, match="token"):
            Limits(token=token)


def refused_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the message with which `mllm serve` of a run that is not there ends."""
    monkeypatch.setattr(sys, "argv", ["mllm", "serve", "no-run", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code not in (0, None)
    return f"{ended.value.code} {capsys.readouterr().err}"


@pytest.mark.parametrize("arguments", [["--token", ""], []])
def test_an_empty_token_of_the_command_or_its_variable_does_not_serve(arguments, monkeypatch, capsys):
    monkeypatch.setenv("MLLM_TOKEN", "")
    assert "The token is empty" in refused_command(monkeypatch, capsys, *arguments)


def test_an_address_that_cannot_be_bound_is_an_error_before_anything_is_loaded(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for host in ("127.0.0.1", "192.0.2.1", "no.such.host.invalid", "x" * 300):
            with pytest.raises(MLLMError, match="cannot listen on"):
                bind(host, port)
        assert "cannot listen on 127.0.0.1" in refused_command(monkeypatch, capsys, "--port", str(port))


# Time


LONG = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\nx"


@pytest.mark.parametrize("part", [b"", b"POST /v1/chat/comp", LONG])
def test_a_request_that_is_sent_in_part_is_closed_at_the_deadline(model, part, served):
    with served(model, deadline=0.5) as port, socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(part)
        started = time.monotonic()
        for _ in range(200):  # whatever trickles in
            with contextlib.suppress(ConnectionError):
                sock.send(b"x")
            sock.settimeout(0.05)
            try:
                if not sock.recv(2**16):
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        assert time.monotonic() - started < 8


def test_a_body_that_is_sent_in_part_is_told_so(model, served):
    with served(model, deadline=0.5) as port, sent(port, ask(), part=0.5) as sock:
        head, _, body = b"".join(iter(lambda: sock.recv(2**16), b"")).partition(b"\r\n\r\n")
        assert b" 408 " in head and "completely in 0.5 seconds" in json.loads(body)["error"]["message"]


def test_what_is_not_http_is_refused_in_openais_schema(model, served):
    with served(model) as port, socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(b"no request\r\n\r\n")
        head, _, body = b"".join(iter(lambda: sock.recv(2**16), b"")).partition(b"\r\n\r\n")
    assert b" 400 " in head and json.loads(body)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_in_the_queue_frees_its_place_at_once(model, gate, stream, served):
    with served(model, batch=1, waiting=1) as port, concurrent.futures.ThreadPoolExecutor(2) as pool:
        running = pool.submit(post, port, ask("first", max_tokens=2))
        wait_for(port, batch_size=1)
        with sent(port, ask("second", stream=stream)):
            wait_for(port, queue_length=1, requests_in_progress=2)
            assert post(port, ask("third"))[0] == 429
        wait_for(port, queue_length=0, requests_in_progress=1, disconnects_total=1)  # the first still runs
        fourth = pool.submit(post, port, ask("fourth", max_tokens=2))
        wait_for(port, queue_length=1)
        gate.set()
        assert [running.result()[0], fourth.result()[0]] == [200, 200]


def test_metrics_count_requests_batches_and_tokens(model, monkeypatch, served):
    with served(model, token="sesame") as port:
        assert post(port, ask())[0] == 401
    with served(model) as port:
        first = post(port, ask(max_tokens=7))[1]["usage"]
        second = post(port, ask("hello", max_tokens=4))[1]["usage"]
        assert post(port, ask(max_tokens=0))[0] == 400
        wait_for(port, batches_total=2)
        values = metrics(port)
        assert values['requests_total{status="200"}'] == 2 and values['requests_total{status="400"}'] == 1
        assert values["generated_tokens_total"] == first["completion_tokens"] + second["completion_tokens"] == 11
        assert values["prompt_tokens_total"] == first["prompt_tokens"] + second["prompt_tokens"]
        assert values["batched_requests_total"] == 2 and values["errors_total"] == 0
        assert values["tokens_per_second"] > 0 and values["decoding_seconds_total"] > 0
        monkeypatch.setattr(model.lm, "generate", lambda *arguments, **options: 1 / 0)
        assert post(port, ask())[0] == 500
        assert metrics(port)["errors_total"] == 1


# Stop strings


def test_stop_strings_end_a_text_as_those_of_transformers_do():
    from transformers import StopStringCriteria

    tokenizer = tiny_tokenizer()
    text = tokenizer("a cat, naïve 猫 sat on it</s>", add_special_tokens=False).input_ids
    for stop in ("cat", "ï", "猫 s", "on it", "</s>", "dog", [" sat", "zzz"], "a cat, naïve 猫 sat on it"):
        theirs, ours = StopStringCriteria(tokenizer, stop), StopStrings(tokenizer, stop)
        expected = [bool(theirs(torch.tensor([text[:end]]), None)) for end in range(1, len(text) + 1)]
        ended = [ours.ends(text[:end]) for end in range(1, len(text) + 1)]
        assert ended.index(True) == expected.index(True) if True in expected else True not in ended, stop


def test_a_long_stop_string_costs_nothing():
    started = time.monotonic()
    stops = StopStrings(tiny_tokenizer(), ["x" * 100_000] * 16)
    assert not any(stops.ends([100] * length) for length in range(1, 300))
    assert time.monotonic() - started < 2


# The end


def test_sigterm_ends_within_ten_seconds_whatever_is_half_sent_or_decoded(model, tmp_path):
    model.save(tmp_path / "run")
    slow = "import sys, time, torch; from mllm.lms import sampling; from mllm.__main__ import main; "
    slow += "ends = sampling.RowLimits.__call__; "
    slow += "sampling.RowLimits.__call__ = lambda *a, **o: (time.sleep(0.5), ends(*a, **o))[1]; main()"
    log = tmp_path / "log"
    with log.open("wb") as file:
        command = [sys.executable, "-c", slow, "serve", str(tmp_path / "run"), "--port", "0"]
        process = subprocess.Popen(command, stdout=file, stderr=file)
    while not (started := re.search(rb"running on http://127.0.0.1:(\d+)", log.read_bytes())):
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    port = int(started[1])
    with contextlib.ExitStack() as stack:
        stack.enter_context(sent(port, ask(max_tokens=200, stream=True)))  # would take 100 seconds
        wait_for(port, batch_size=1)
        queued = stack.enter_context(sent(port, ask(max_tokens=200)))
        stack.enter_context(sent(port, ask(), part=0.5))
        half_head = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        half_head.sendall(b"POST /v1")
        wait_for(port, queue_length=1)
        process.send_signal(signal.SIGTERM)
        before = time.monotonic()
        process.wait(timeout=60)
        assert time.monotonic() - before <= 10
        assert b" 503 " in queued.recv(64)
    assert b"Traceback" not in log.read_bytes()
