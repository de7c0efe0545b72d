"""A small server with the routes of vLLM's that an engine at a URL needs, around a stock model of `transformers`."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class Stock(ThreadingHTTPServer):
    """Greedy answers of a stock causal language model to prompts of ids or embeddings, one token an event.

    Args:
        folder: of the model.
        port: to listen on; 0: a free one.
        root: what ``/v1/models`` calls the model's folder; None: the folder.
        context: ``max_model_len``.
        pause: seconds before each token.
        most: tokens after which the process of the engine ends; None: it does not.
        away: a status that every completion gets.
        budget: prompts of embeddings after which ``away`` is 503; None: there is no end.
        loads: whether a LoRA can be loaded while it runs.
    """

    daemon_threads = True

    def __init__(self, folder: str, port: int = 0, **options: Any) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.lm: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.options: dict[str, Any] = {"root": folder, "context": 256, "pause": 0.0, "most": None, "away": None}
        self.options |= {"budget": None, "loads": False}
        self.options |= options
        self.asked: list[dict[str, Any]] = []
        self.running, self.most_running, self.cancelled, self.lock = 0, 0, 0, threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that disconnect are a part of the tests."""

    @torch.no_grad()
    def tokens(self, body: dict[str, Any]) -> Iterator[int]:
        """Yield the greedy tokens, each of the whole sequence computed anew."""
        if "prompt_embeds" in body:
            embeds = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)[None]
        else:
            embeds = self.lm.get_input_embeddings()(torch.tensor([body["prompt"]]))
        for _ in range(body["max_tokens"]):
            token = int(self.lm(inputs_embeds=embeds).logits[0, -1].argmax())
            yield token
            if token in body["stop_token_ids"]:
                return
            embeds = torch.cat([embeds, self.lm.get_input_embeddings()(torch.tensor([[token]]))], dim=1)


class Handler(BaseHTTPRequestHandler):
    server: Stock
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def reply(self, body: dict[str, Any], status: int = 200) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        options = self.server.options
        self.reply({"data": [{"id": "tiny", "root": options["root"], "max_model_len": options["context"]}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            self.reply({"tokens": self.server.tokenizer(body["prompt"], add_special_tokens=False).input_ids})
        elif self.path == "/v1/load_lora_adapter":
            self.reply({"object": "error", "message": "The route is turned off."}, 200 if self.loads else 404)
        elif status := self.away:
            self.reply({"error": {"message": "no room"}}, status)
        else:
            self.complete(body)

    @property
    def away(self) -> int | None:
        budget = self.server.options["budget"]
        away: int | None = self.server.options["away"]
        return 503 if budget is not None and len(self.server.asked) >= budget else away

    @property
    def loads(self) -> bool:
        return bool(self.server.options["loads"])

    def complete(self, body: dict[str, Any]) -> None:
        server, width = self.server, self.server.lm.config.hidden_size
        if "prompt_embeds" in body:
            tensor = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
            if tensor.shape[1] != width:
                message = f"`prompt_embeds` hidden_size {tensor.shape[1]} does not match the model's {width}."
                return self.reply({"error": {"message": message}}, 400)
            server.asked.append({**body, "prompt_embeds": tensor})
        with server.lock:
            server.running += 1
            server.most_running = max(server.running, server.most_running)
        try:
            self.stream(body)
        except OSError:
            server.cancelled += 1
        finally:
            with server.lock:
                server.running -= 1
        return None

    def stream(self, body: dict[str, Any]) -> None:
        server = self.server
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number, token in enumerate(server.tokens(body)):
            if server.options["most"] is not None and number >= server.options["most"]:
                self.close_connection = True
                return self.connection.close()
            time.sleep(server.options["pause"])
            self.chunk({"choices": [{"token_ids": [token]}]})
        self.chunk("[DONE]")
        self.wfile.write(b"0\r\n\r\n")
        return None

    def chunk(self, event: Any) -> None:
        data = f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


@pytest.fixture(scope="session")
def stock() -> Callable[..., Any]:
    """Return a context manager that serves a stock language model."""

    @contextlib.contextmanager
    def serving(folder: str, **options: Any) -> Iterator[Stock]:
        server = Stock(folder, **options)
        try:
            yield server
        finally:
            server.close()

    return serving


@pytest.fixture(scope="session")
def saved(tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a saved tiny model."""
    return str(tiny_model().save(tmp_path_factory.mktemp("saved")))
