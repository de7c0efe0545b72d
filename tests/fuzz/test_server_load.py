"""Load a server with good and hostile clients: no good answer is lost or changed, and memory stays within its bound.

A short share runs with the tests. The long one is a program: ``make fuzz-server``, or
``python tests/fuzz/test_server_load.py --seed 7 --clients 64 --seconds 180``.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import io
import json
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

import mllm
from mllm.serve.memory import SECONDS
from mllm.serve.schema import Limits
from mllm.testing import tiny_encoder, tiny_image, tiny_lm

TOKEN = "sesame"
LIMITS = Limits(body=4 * 2**20, bodies=16 * 2**20, pixels=8_000_000, token=TOKEN, batch=16, waiting=64)
RETURNED = 50  # megabytes that the memory may have grown by when all requests are answered
OPTIONS = ["--max-body", "4", "--max-bodies", "16", "--max-pixels", "8", "--token", TOKEN]


def data_url(data: bytes) -> str:
    """Return bytes as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def png(image: Image.Image) -> bytes:
    """Return an image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def declared(width: int, height: int) -> bytes:
    """Return a PNG file of one bit per pixel, all of them zeros, as large as its header declares."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj()
    row = bytes((width + 7) // 8 + 1)
    rows = max(1, 2**20 // len(row))
    pixels = b"".join(packer.compress(row * min(rows, height - start)) for start in range(0, height, rows))
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", pixels + packer.flush()) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def ask(text: str, *urls: str, **settings: Any) -> dict[str, Any]:
    """Return a request."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": [*images, {"type": "text", "text": text}]}], **settings}


GOOD = [
    ask("hello", max_tokens=8),
    ask("what is it?", data_url(png(tiny_image(1))), max_tokens=6),
    ask("and these?", data_url(png(tiny_image(2))), data_url(png(tiny_image(3))), max_tokens=5),
    ask("how large?", data_url(png(tiny_image(4, size=(600, 400)))), max_tokens=4),
    ask("draw lots", max_tokens=10, temperature=1.3, seed=5),
    ask("stop early", max_tokens=12, stop=["e", "zz"]),
]
BAD: dict[str, Callable[[random.Random], bytes]] = {  # bodies that are answered with a status of 4xx
    "cut JSON": lambda chance: json.dumps(GOOD[1]).encode()[: chance.randrange(20, 300)],
    "random bytes": lambda chance: chance.randbytes(chance.randrange(1, 2000)),
    "deep JSON": lambda chance: b"[" * chance.choice((2_000, 100_000, 1_000_000)),
    "many values": lambda chance: b'{"messages": [' + b"[]," * 1_000_000 + b"[]]}",
    "no messages": lambda chance: json.dumps({"messages": [3] * 50_000}).encode(),
    "unknown field": lambda chance: json.dumps({**GOOD[0], chance.choice(("top_k", "n" * 500)): 3}).encode(),
    "huge integer": lambda chance: b'{"messages": 1' + b"0" * chance.randrange(1, 9000) + b"}",
    "huge seed": lambda chance: json.dumps({**GOOD[4], "seed": 2 ** chance.randrange(63, 200)}).encode(),
    "long stop": lambda chance: json.dumps({**GOOD[0], "stop": "x" * chance.randrange(300, 100_000)}).encode(),
    "surrogate": lambda chance: json.dumps(ask("hi \ud800")).encode(),
    "long text": lambda chance: json.dumps(ask("many words " * chance.randrange(5_000, 250_000))).encode(),
    "many parts": lambda chance: json.dumps(ask("x", *["data:,"] * 5000)).encode(),
    "a large image": lambda chance: json.dumps(ask("x", data_url(declared(8000, 8000)))).encode(),
    "a long image": lambda chance: json.dumps(ask("x", data_url(declared(1, 8_000_000)))).encode(),
    "no image": lambda chance: json.dumps(ask("x", data_url(chance.randbytes(300)))).encode(),
    "cut image": lambda chance: json.dumps(ask("x", data_url(png(tiny_image(5))[: chance.randrange(9, 60)]))).encode(),
    "odd URL": lambda chance: json.dumps(
        ask("x", chance.choice(("", "data:", "data:image/png,x", "http://[::1", "file:///etc/passwd", "/x\0", "é" * 9)))
    ).encode(),
    "long body": lambda chance: b"x" * (5 * 2**20),
}


@dataclass
class Load:
    """Clients of one server.

    Attributes:
        port: of the server.
        deadline: of the server, for a request to be sent.
        answers: to `GOOD`, each asked alone.
        counts: what happened.
        problems: what must not happen.
        stop: is set when the clients are to end.
    """

    port: int
    deadline: float
    answers: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def post(self, body: bytes, token: str = TOKEN) -> tuple[int, bytes]:
        """Return the status and body of the answer."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {token}"})
            answer = connection.getresponse()
            return answer.status, answer.read()

    def good(self, chance: random.Random) -> None:
        """Send a good request, again while the server is busy, and compare the answer."""
        number, stream = chance.randrange(len(GOOD)), chance.random() < 0.5
        body = json.dumps({**GOOD[number], "stream": stream}).encode()
        while not self.stop.is_set():
            status, answer = self.post(body)
            if status != 429:
                self.counts["good"] += 1
                text = text_of(answer) if status == 200 else f"status {status}: {answer[:200]!r}"
                if not self.answers or text != self.answers[number]:
                    self.problems.append(f"good request {number}, stream {stream}: {text!r}")
                return
            self.counts["good, asked to wait"] += 1
            time.sleep(0.2)

    def bad(self, chance: random.Random) -> None:
        """Send a bad body, which is refused in OpenAI's schema."""
        kind = chance.choice(list(BAD))
        self.counts["bad"] += 1
        try:
            status, answer = self.post(BAD[kind](chance))
        except (ConnectionError, http.client.HTTPException):  # a body that is too long is answered while it is sent
            if kind != "long body":
                self.problems.append(f"{kind}: the connection was closed")
            return
        self.check(kind, status, answer)

    def check(self, kind: str, status: int, answer: bytes) -> None:
        """Note an answer that is not one error in OpenAI's schema."""
        try:
            message = json.loads(answer)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = None
        if not 400 <= status < 500 or not isinstance(message, str):
            self.problems.append(f"{kind}: status {status}, {answer[:200]!r}")

    def wrong_token(self, chance: random.Random) -> None:
        """Send a good request with a wrong token."""
        self.counts["wrong token"] += 1
        status, answer = self.post(json.dumps(GOOD[0]).encode(), chance.choice(("", "x", "sesam", "é" * 20)))
        self.check("wrong token", status, answer)
        if status != 401:
            self.problems.append(f"wrong token: status {status}")

    def half_sent(self, chance: random.Random) -> None:
        """Send a part of a request, and wait until the server closes the connection."""
        self.counts["half sent"] += 1
        with self.sent(chance, json.dumps(GOOD[1]).encode(), part=chance.random() * 0.95) as sock:
            started = time.monotonic()
            with contextlib.suppress(ConnectionError):
                while sock.recv(2**16):
                    pass
        if time.monotonic() - started > self.deadline + 6:
            self.problems.append(f"half sent: open for {time.monotonic() - started:.1f} s")

    def hang_up(self, chance: random.Random) -> None:
        """Send a request, and disconnect in the queue or while it is decoded."""
        self.counts["hang-up"] += 1
        body = json.dumps({**chance.choice(GOOD), "max_tokens": 200, "stream": chance.random() < 0.5, "stop": None})
        with self.sent(chance, body.encode()):
            time.sleep(chance.random() * 0.5)

    def not_http(self, chance: random.Random) -> None:
        """Send bytes that are no request."""
        self.counts["not HTTP"] += 1
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=20) as sock,
            contextlib.suppress(ConnectionError),
        ):
            sock.sendall(chance.choice((b"\x16\x03\x01" + bytes(40), b"GET /\r\n\r\n", b"x" * 200_000)) + b"\r\n\r\n")
            while sock.recv(2**16):
                pass

    @contextlib.contextmanager
    def sent(self, chance: random.Random, body: bytes, part: float = 1.0) -> Iterator[socket.socket]:
        """Connect, and send a request or a part of it."""
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as sock:
            sock.sendall(request[: round(len(request) * part)])
            yield sock

    def client(self, seed: str, hostile: bool) -> None:
        """Be one client until the end."""
        chance = random.Random(seed)
        kinds = [self.bad] * 4 + [self.wrong_token, self.half_sent, self.hang_up, self.not_http]
        while not self.stop.is_set():
            try:
                (chance.choice(kinds) if hostile else self.good)(chance)
            except Exception as error:
                if not self.stop.is_set():
                    self.problems.append(f"{'hostile' if hostile else 'good'} client: {error!r}")


def text_of(answer: bytes) -> str:
    """Return the text of an answer, whole or streamed."""
    if answer.startswith(b"{"):
        return str(json.loads(answer)["choices"][0]["message"]["content"])
    events = [line[6:] for line in answer.decode().splitlines() if line.startswith("data: {")]
    deltas = [choice["delta"] for event in events for choice in json.loads(event)["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)


def resident(process: int, name: str = "VmRSS") -> float:
    """Return the megabytes of memory that a process has; ``VmHWM``: had at most."""
    (kilobytes,) = re.findall(rf"{name}:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    return int(kilobytes) / 1024


@contextlib.contextmanager
def server(folder: Path, deadline: float) -> Iterator[tuple[subprocess.Popen[bytes], int, Path]]:
    """Run `mllm serve` with tiny parts: its process, port and log."""
    parts = tiny_encoder(folder / "encoder"), tiny_lm(folder / "lm")
    mllm.assemble(*parts, {"type": "linear", "tokens": 4}).save(folder / "run")
    log = folder / "log"
    command = [sys.executable, "-m", "mllm", "serve", str(folder / "run"), "--port", "0", *OPTIONS]
    command += ["--deadline", str(deadline)]
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            while not (started := re.search(rb"running on http://[^:]+:(\d+)", log.read_bytes())):
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            yield process, int(started[1]), log
        finally:
            process.kill()


def run(seed: int, clients: int, seconds: float, deadline: float) -> dict[str, Any]:
    """Load a server for some seconds, let it rest, and end it under load; return the figures."""
    with tempfile.TemporaryDirectory() as folder, server(Path(folder), deadline) as (process, port, log):
        load = Load(port, deadline)
        for body in GOOD:
            status, answer = load.post(json.dumps(body).encode())
            assert status == 200, answer
            load.answers.append(text_of(answer))
        warm_up(load, seed)
        before = resident(process.pid)
        with clients_of(load, seed, clients):
            time.sleep(seconds)
        wait_until_idle(port)
        rest(process.pid, before)
        after, peak = resident(process.pid), resident(process.pid, "VmHWM")
        last = Load(port, deadline, load.answers)
        with clients_of(last, seed + 1, clients):
            time.sleep(min(3.0, seconds / 4))
            last.stop.set()
            started = time.monotonic()
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
            ended = time.monotonic() - started
        problems = load.problems + (["a traceback in the log"] if b"Traceback" in log.read_bytes() else [])
        return {
            "requests": sum(count for kind, count in load.counts.items() if kind != "good, asked to wait"),
            **load.counts,
            "RSS before": round(before),
            "RSS at most": round(peak),
            "RSS after": round(after),
            "RSS bound": round(before + LIMITS.memory / 2**20),
            "SIGTERM seconds": round(ended, 1),
            "problems": problems,
        }


def warm_up(load: Load, seed: int) -> None:
    """Send each kind of request once, so that the memory that stays is there."""
    chance = random.Random(seed)
    for body in BAD.values():
        with contextlib.suppress(ConnectionError, http.client.HTTPException):
            load.post(body(chance))


@contextlib.contextmanager
def clients_of(load: Load, seed: int, number: int) -> Iterator[None]:
    """Run clients, half of them hostile, until the block ends."""
    threads = [
        threading.Thread(target=load.client, args=(f"{seed}-{client}", client % 2 == 1)) for client in range(number)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        load.stop.set()
        for thread in threads:
            thread.join()


def wait_until_idle(port: int) -> None:
    """Wait until no request is in progress, by the server's own metrics."""
    for _ in range(100):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        if all(f"mllm_{name} 0\n" in text for name in ("requests_in_progress", "body_bytes", "image_pixels")):
            return
        time.sleep(0.1)
    raise AssertionError(text)


def rest(process: int, before: float) -> None:
    """Wait until memory was returned, which the server does every few seconds."""
    until = time.monotonic() + 2 * SECONDS + 2
    while resident(process) - before >= RETURNED and time.monotonic() < until:
        time.sleep(0.2)


def test_no_good_answer_is_lost_or_changed_among_hostile_clients() -> None:
    figures = run(seed=1, clients=12, seconds=4, deadline=2)
    assert figures["problems"] == []
    assert figures["good"] > 10 and figures["bad"] > 5
    assert figures["RSS at most"] <= figures["RSS bound"] and figures["RSS after"] - figures["RSS before"] < RETURNED
    assert figures["SIGTERM seconds"] <= 10


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Load a server with good and hostile clients.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--deadline", type=float, default=10)
    figures = run(**vars(parser.parse_args()))
    print(json.dumps({**figures, "problems": len(figures["problems"])}, indent=2))
    for problem in figures["problems"][:20]:
        print(problem)
    sys.exit(bool(figures["problems"]))
