"""The server, spoken to over a socket by OpenAI's own client, by bad clients, and by a browser."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import functools
import http.client
import http.server
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi import Request, Response

import mllm
from mllm.errors import MLLMError
from mllm.media.images import source_of
from mllm.outputs import data_url
from mllm.prompts.messages import turns
from mllm.scorers.index import ImageIndex
from mllm.serve.remote import Remote, public_address
from mllm.testing import tiny_image

A, B = tiny_image(1), tiny_image(2)


def url(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def user(text: str, *images: Any) -> dict[str, Any]:
    pictures = [{"type": "image_url", "image_url": {"url": i if isinstance(i, str) else url(i)}} for i in images]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}


@pytest.fixture(scope="module")
def model(tiny_parts):
    return mllm.assemble(
        tiny_parts[0], tiny_parts[1], {"type": "linear", "tokens": 4}, prompt={"template": "See{images}. {prompt}"}
    )


@pytest.fixture(scope="module")
def port(model, served):
    with served(model) as port:
        yield port


def client(port: int, key: str = "none") -> Any:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0, timeout=30)


def post(port: int, body: bytes | dict[str, Any], **headers: str) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


def expected(model: Any, *messages: dict[str, Any], **decoding: Any) -> str:
    ours = [
        {**m, "content": [p if p["type"] == "text" else {"type": "image", "image": source_of(p["image_url"]["url"])}
                          for p in m["content"]]}
        for m in messages
    ]  # fmt: skip
    return str(model.generate([turns(model, ours)], **decoding)[0])


def test_openais_client_gets_what_the_model_says(model, port):
    with client(port) as api:
        assert [entry.id for entry in api.models.list()] == ["tiny"]
        ask = user("what is it?", A, B)
        answer = api.chat.completions.create(model="tiny", messages=[ask], max_tokens=9)
        assert answer.choices[0].message.content == expected(model, ask, max_new_tokens=9)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 9
        assert answer.usage.prompt_tokens == len(model.encode(["See", A, B, ". Question: what is it? Answer:"]).ids)


def test_a_stream_is_the_answer_in_pieces(model, port):
    ask = user("what is it?", A)
    drawn: dict[str, Any] = {"temperature": 1.3, "seed": 5, "top_p": 0.9}
    for options in ({}, drawn):
        ours = {key: value for key, value in options.items()}
        whole = expected(model, ask, max_new_tokens=12, **ours)
        with client(port) as api:
            events = list(
                api.chat.completions.create(
                    model="tiny", messages=[ask], max_completion_tokens=12, stream=True,
                    stream_options={"include_usage": True}, **options,
                )
            )  # fmt: skip
        assert "".join(e.choices[0].delta.content or "" for e in events if e.choices) == whole
        assert [e.choices[0].finish_reason for e in events if e.choices][-1] == "length"
        assert events[-1].usage.completion_tokens == 12


def test_a_stop_string_ends_an_answer_and_is_not_in_it(model, port):
    ask = user("what is it?", A)
    whole = expected(model, ask, max_new_tokens=30)
    stop = next(letter for letter in whole if letter.isascii())
    for stream in (False, True):
        with client(port) as api:
            answer = api.chat.completions.create(
                model="tiny", messages=[ask], max_tokens=30, stop=[stop, "zzzz"], stream=stream
            )
            text = (
                "".join(e.choices[0].delta.content or "" for e in answer)
                if stream
                else answer.choices[0].message.content
            )
        assert text == whole[: whole.index(stop)].rstrip()


def test_requests_that_arrive_together_are_decoded_together(model, port, monkeypatch):
    sizes = []
    generate = model.lm.generate

    def watched(mask, *arguments, **options):
        sizes.append(len(mask))
        return generate(mask, *arguments, **options)

    monkeypatch.setattr(model.lm, "generate", watched)
    asks = [user(f"number {number}?", *([A] * (number % 3))) for number in range(16)]
    with client(port) as api, concurrent.futures.ThreadPoolExecutor(16) as pool:
        create = api.chat.completions.create
        futures = [pool.submit(create, model="tiny", messages=[a], max_tokens=3 + n % 5) for n, a in enumerate(asks)]
        texts = [future.result().choices[0].message.content for future in futures]
    assert sum(sizes) == 16 and len(sizes) < 16
    monkeypatch.undo()
    assert texts == [expected(model, ask, max_new_tokens=3 + n % 5) for n, ask in enumerate(asks)]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "JSON"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "role"),
        ({"messages": [user("x", "data:image/png;base64,AAAA")]}, 400, "not a readable image"),
        ({"messages": [user("x", "https://example.com/a.png")]}, 400, "does not download"),
        ({"messages": [user("x", "/etc/passwd")]}, 400, "does not read"),
        ({"messages": [user("x", "file:///etc/passwd")]}, 400, "does not read"),
        ({"messages": [user("x", "ftp://example.com/a.png")]}, 400, "is not read"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}]}, 400, "image_url"),
        ({"messages": [user("x", A, A, A)]}, 400, "3 images; at most 2"),
        ({"messages": [user("x" * 300)]}, 400, "context is 256"),
        ({"messages": [user("x")], "max_tokens": 0}, 400, "max_tokens"),
        ({"messages": [user("x")], "temperature": 9}, 400, "temperature"),
        ({"messages": [user("x")], "n": 2}, 400, "n:"),
        ({"messages": [user("y" * 200_000)]}, 413, "longer than"),
        ({"messages": [user("x"), {"role": "assistant", "content": "y"}]}, 400, "the user's"),
    ],
)
def test_a_bad_request_is_told_why(model, body, status, message, served):
    with served(model, images=2, body=100_000) as port:
        found, answer = post(port, body)
        assert (found, message in answer["error"]["message"]) == (status, True), answer
        assert post(port, {"messages": [user("x")], "max_tokens": 2})[0] == 200


def test_a_body_without_a_length_is_counted_as_it_comes(model, served):
    with served(model, body=100_000) as port, socket.create_connection(("127.0.0.1", port)) as sock:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        sock.sendall(head.encode())
        with contextlib.suppress(OSError):
            for _ in range(50):
                sock.sendall(b"2710\r\n" + b"y" * 10_000 + b"\r\n")
        assert b" 413 " in sock.recv(64)


def test_a_token_is_asked_for_where_one_is_set(model, served):
    with served(model, token="sesame") as port:
        with client(port, "wrong") as api, pytest.raises(openai.AuthenticationError):
            api.models.list()
        for header in ({}, {"Authorization": "sesame"}, {"Authorization": "Basic sesame"}, {"Authorization": "Bearer"}):
            assert post(port, {"messages": [user("x")]}, **header)[0] == 401
        with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:  # before its body is read
            sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nx")
            assert b" 401 " in sock.recv(64)
        with client(port, "sesame") as api:
            assert api.chat.completions.create(model="m", messages=[user("x")], max_tokens=2).choices
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/health")
        assert json.loads(connection.getresponse().read()) == {"status": "ok"}
        connection.close()


@pytest.fixture
def slow(model, monkeypatch):
    """Every token takes a while, so that a request lasts; returns the tokens made."""
    made = []
    logits = model.lm.model.forward

    def forward(*arguments, **options):
        made.append(1)
        time.sleep(0.05)
        return logits(*arguments, **options)

    monkeypatch.setattr(model.lm.model, "forward", forward)
    return made


def test_a_full_queue_answers_429_and_empties_again(model, slow, served):
    body = {"messages": [user("x")], "max_tokens": 20}
    with served(model, batch=1, waiting=1) as port, concurrent.futures.ThreadPoolExecutor(6) as pool:
        found = [future.result()[0] for future in [pool.submit(post, port, body) for _ in range(6)]]
        assert set(found) == {200, 429}
        assert post(port, body)[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_place(model, slow, stream, served):
    body = json.dumps({"messages": [user("x")], "max_tokens": 200, "stream": stream}).encode()
    with served(model, batch=1) as port:
        with socket.create_connection(("127.0.0.1", port)) as sock:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            sock.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            while len(slow) < 3:
                time.sleep(0.01)
        started = time.monotonic()
        assert post(port, {"messages": [user("x")], "max_tokens": 1})[0] == 200
        assert time.monotonic() - started < 5  # 200 tokens would take ten seconds


def test_a_failure_of_the_model_costs_one_batch(model, port, monkeypatch):
    monkeypatch.setattr(model.lm, "generate", lambda *arguments, **options: 1 / 0)
    status, answer = post(port, {"messages": [user("x")]})
    assert status == 500 and "ZeroDivisionError" in answer["error"]["message"]
    monkeypatch.undo()
    assert post(port, {"messages": [user("x")], "max_tokens": 2})[0] == 200


def test_remote_pictures_come_from_allowed_places_only(tmp_path):
    A.save(tmp_path / "a.png")
    (tmp_path / "inside").mkdir()
    remote = Remote(["127.0.0.1", "localhost"], [tmp_path / "inside"])
    for place in ("http://127.0.0.1/a.png", "http://localhost:1/a.png"):
        with pytest.raises(MLLMError, match="private address"):
            remote.read(place)
    for path in ("a.png", "inside/../a.png"):
        with pytest.raises(MLLMError, match="does not read"):
            remote.read(str(tmp_path / path))
    shutil.move(tmp_path / "a.png", tmp_path / "inside/a.png")
    assert remote.read(f"file://{tmp_path}/inside/a.png") == (tmp_path / "inside/a.png").read_bytes()
    for host in ("10.0.0.1", "169.254.169.254", "::1", "0.0.0.0", "192.168.1.1"):
        with pytest.raises(MLLMError, match="private address"):
            public_address(host, 80)


def test_a_redirect_is_not_followed_and_a_good_answer_is_read(monkeypatch):
    class Site(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302 if self.path == "/away" else 200)
            self.send_header("Location", "http://127.0.0.1/")
            self.end_headers()
            self.wfile.write(b"bytes")

        def log_message(self, *arguments): ...

    monkeypatch.setattr("mllm.serve.remote.public_address", lambda host, port: "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as site:
        threading.Thread(target=site.serve_forever).start()
        remote, base = Remote(["pictures.test"]), f"http://pictures.test:{site.server_port}"
        assert remote.read(f"{base}/a.png") == b"bytes"
        with pytest.raises(MLLMError, match="redirects are not followed"):
            remote.read(f"{base}/away")
        site.shutdown()


def test_sigterm_finishes_what_is_running(model, tmp_path):
    model.save(tmp_path / "run")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mllm", "serve", str(tmp_path / "run"), "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "running on" not in (line := process.stderr.readline()):
        assert line, "the server did not start"
    with client(port) as api:
        events = api.chat.completions.create(model="m", messages=[user("x")], max_tokens=100, stream=True)
        next(iter(events))  # it is being decoded
        process.send_signal(signal.SIGTERM)
        assert list(events)[-1].choices[0].finish_reason in ("length", "stop")
    _, rest = process.communicate(timeout=60)
    assert "Traceback" not in rest


@pytest.mark.slow
def test_a_soak_loses_no_good_request_and_keeps_no_memory(model, served):
    good: dict[str, Any] = {"messages": [user("what?", A)], "max_tokens": 2}
    bad: list[Any] = [
        {"messages": [user("x", "data:image/png;base64,AAAA")]},
        {"messages": 3},
        {"messages": [user("y" * 60_000)]},
    ]

    def abandoned(place: Any) -> None:
        body = json.dumps({**good, "max_tokens": 50, "stream": True}).encode()
        with socket.create_connection(("127.0.0.1", place)) as sock:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            sock.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)

    def one(number: int) -> bool:
        if number % 4 == 3:
            abandoned(place)
            return True
        if number % 4 == 2:
            return post(place, bad[number % 3])[0] in (400, 413)
        return post(place, good)[0] == 200

    with served(model, body=50_000, waiting=10_000) as place, concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(200)))
        before = memory()
        assert all(pool.map(one, range(200, SOAK)))
        assert memory() - before < 30e6


SOAK = int(os.environ.get("MLLM_SOAK", "2000"))  # requests


def memory() -> float:
    """Bytes that this process holds."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1e3  # type: ignore[index]


def test_the_page_takes_a_dropped_picture_and_streams_the_answer(model, chromium, served):
    act = """
    const wait = async (until) => { while (!until()) await new Promise((go) => setTimeout(go, 20)); };
    addEventListener("load", async () => {
      const bytes = await (await fetch("/picture.png")).blob();
      const data = new DataTransfer();
      data.items.add(new File([bytes], "a.png", { type: "image/png" }));
      dispatchEvent(new DragEvent("drop", { dataTransfer: data }));
      await wait(() => document.querySelectorAll("#waiting img").length === 1);
      const grown = [];
      document.getElementById("text").value = "what is it?";
      document.getElementById("send").click();
      const said = () => [...document.querySelectorAll("#talk .assistant")].map((item) => item.textContent);
      await wait(() => { grown.push(said()[0]); 
        return document.getElementById("send").textContent === "Send" && said()[0]; });
      document.getElementById("text").value = "and <b>why</b>?";
      document.getElementById("send").click();
      await wait(() => said().length === 2 && document.getElementById("send").textContent === "Send");
      const seen = { name: document.getElementById("name").textContent, said: said(),
        asked: [...document.querySelectorAll("#talk .user")].map((item) => item.textContent),
        pictures: document.querySelectorAll("#talk img").length, steps: new Set(grown).size,
        wrong: document.querySelectorAll(".wrong").length };
      await fetch("/seen", { method: "POST", body: JSON.stringify(seen) });
    });"""
    told: list[dict[str, Any]] = []

    with served(model, change=acted(act, told)) as port:
        chromium(f"http://127.0.0.1:{port}/acted", until=lambda: told)
    (seen,) = told
    first = user("what is it?", A)
    said = expected(model, first)
    assert seen["name"] == "tiny" and seen["wrong"] == 0 and seen["pictures"] == 1
    assert seen["said"][0] == said and len(seen["said"]) == 2
    assert seen["asked"] == ["what is it?", "and <b>why</b>?"]  # what is typed is text, never HTML
    assert seen["steps"] > 1  # it was seen to grow


def acted(act: str, told: list[dict[str, Any]]) -> Callable[[Any], None]:
    """Return what adds to a server the page with a script in it, and a place where that tells what it saw."""
    buffer = io.BytesIO()
    A.save(buffer, "PNG")

    def page(app: Any) -> None:
        real = next(route for route in app.routes if route.path == "/").endpoint

        @app.get("/acted")
        async def acted():
            answer = await real()
            text = answer.body.decode()
            (nonce,) = re.findall(r'script nonce="([^"]+)"', text)
            del answer.headers["content-length"]
            body = text.replace("</body>", f'<script nonce="{nonce}">{act}</script></body>')
            return Response(body, media_type="text/html", headers=dict(answer.headers))

        @app.get("/picture.png")
        async def picture():
            return Response(buffer.getvalue(), media_type="image/png")

        async def report(request: Request) -> dict[str, Any]:
            told.append(await request.json())
            return {}

        app.add_api_route("/seen", report, methods=["POST"])

    return page


@pytest.fixture
def index(tiny_model, tmp_path):
    """A model with a retrieval head, and an index that it shows readily."""
    model = tiny_model(heads=[{"type": "retrieval", "dim": 6}], tokens=["[RET]"])
    for number in range(3):
        tiny_image(number, size=(60, 40)).save(tmp_path / f"{number}.png")
    return model, ImageIndex.build(model, sorted(tmp_path.glob("*.png")))


def test_images_of_an_index_come_with_the_message(index, served):
    model, found = index
    ask = user("what is it?", A)
    prompt = turns(model, [{**ask, "content": [{"type": "image", "image": A}, ask["content"][1]]}])
    for bias in (1e4, -1e4):
        (output,) = model.generate([prompt], index=found, image_logit_bias=bias, max_new_tokens=5)
        with served(model, show={"index": found, "image_logit_bias": bias}) as port:
            _, answer = post(port, {"messages": [ask], "max_tokens": 5})
            with client(port) as api:
                events = list(
                    api.chat.completions.create(model="m", messages=[ask], max_completion_tokens=5, stream=True)
                )
        message = answer["choices"][0]["message"]
        assert message["content"] == str(output).rstrip()
        told = [image["image_url"]["url"] for image in message.get("images", [])]
        assert told == [data_url(image) for image in output.images] and bool(told) == (bias > 0)
        streamed = [image for event in events for image in getattr(event.choices[0].delta, "images", None) or []]
        assert streamed == message.get("images", [])
        if told:
            assert message["images"][0]["at"] == 0 and source_of(told[0]).open().size == (60, 40)


def test_images_that_are_made_come_with_the_message(tiny_model, tiny_decoder, served):
    head = {"type": "generation", "tokens": 2, "length": 1, "width": 32, "dim": 16, "layers": 1, "heads": 2}
    model = tiny_model(heads=[head], tokens=["[IMG0]", "[IMG1]"], decoder={"type": "trained", "model": tiny_decoder})
    ask = user("show it")
    for bias in (1e4, -1e4):
        (output,) = model.generate([turns(model, [ask])], image_logit_bias=bias, max_new_tokens=5)
        with served(model, show={"index": None, "image_logit_bias": bias}) as port:
            _, answer = post(port, {"messages": [ask], "max_tokens": 5})
        told = [image["image_url"]["url"] for image in answer["choices"][0]["message"].get("images", [])]
        assert told == [data_url(image) for image in output.images] and bool(told) == (bias > 0)


def test_the_page_shows_images_in_the_answer(index, chromium, served):
    model, found = index
    act = """
    addEventListener("load", async () => {
      document.getElementById("text").value = "what is it?";
      document.getElementById("send").click();
      const pictures = () => [...document.querySelectorAll("#talk .assistant img")];
      const whole = () => pictures().length && pictures().every((one) => one.complete);
      while (!whole()) await new Promise((go) => setTimeout(go, 20));
      const first = document.querySelector("#talk .assistant").childNodes;
      const seen = { wide: pictures().map((one) => one.naturalWidth), order: [...first].map((one) => one.nodeName),
        text: document.querySelector("#talk .assistant").textContent };
      await fetch("/seen", { method: "POST", body: JSON.stringify(seen) });
    });"""
    told: list[dict[str, Any]] = []

    with served(
        model, change=acted(act, told), show={"index": found, "image_logit_bias": 1e4}, max_new_tokens=5
    ) as port:
        chromium(f"http://127.0.0.1:{port}/acted", until=lambda: told)
    (seen,) = told
    prompt = turns(model, [{"role": "user", "content": [{"type": "text", "text": "what is it?"}]}])
    (output,) = model.generate([prompt], index=found, image_logit_bias=1e4, max_new_tokens=5)
    assert seen["wide"] == [60] * len(output.images) and seen["order"].count("IMG") == len(output.images) > 1
    assert seen["text"] == str(output).rstrip()


@pytest.fixture
def chromium(tmp_path):
    """Return a function that opens a page and closes it when something has happened."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        if os.environ.get("CI") == "true":
            pytest.fail("Chromium is missing: install the package chromium")
        pytest.skip("Chromium is missing: install the package chromium")

    def opened(address: str, until: Callable[[], object]) -> None:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                   "--disable-background-networking", f"--user-data-dir={tmp_path}", "--remote-debugging-port=0",
                   address]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            give_up = time.monotonic() + 60
            while not until():
                assert process.poll() is None and time.monotonic() < give_up, "the page did not report"
                time.sleep(0.05)
        finally:
            process.terminate()
            process.wait()

    return opened


def test_images_of_different_sizes_in_one_batch_are_answered_as_one_by_one_and_counted(tiny_parts, served):
    encoder = {"model": tiny_parts[0], "tiles": {"kind": "dynamic", "most": 4}}
    model = mllm.assemble(encoder, tiny_parts[1], {"type": "linear", "tokens": 4})
    asks = [user("what is it?", tiny_image(seed, size)) for seed, size in enumerate([(32, 32), (64, 33), (40, 90)])]
    with served(model) as port, client(port) as api, concurrent.futures.ThreadPoolExecutor() as pool:
        send = functools.partial(api.chat.completions.create, model="tiny", max_tokens=8)
        answers = list(pool.map(lambda ask: send(messages=[ask]), asks))
    assert [answer.choices[0].message.content for answer in answers] == [
        expected(model, ask, max_new_tokens=8) for ask in asks
    ]
    first, *others = (answer.usage.prompt_tokens for answer in answers)
    assert [count - first for count in others] == [2 * 4, 2 * 4]  # 2 x 1 or 1 x 2 tiles and a thumbnail, and not 1 tile
