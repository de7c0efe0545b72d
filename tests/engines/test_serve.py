"""Our server in front of an engine streams, cancels, and gives 503 without it; an evaluation continues."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import mllm
from mllm.evaluation import evaluate
from mllm.testing import tiny_image

pytest.importorskip("fastapi")


class Response(NamedTuple):
    status: int
    headers: Any
    body: bytes


@pytest.fixture(scope="module")
def engine(stock: Any, tiny_parts: tuple[str, str]) -> Iterator[Any]:
    with stock(tiny_parts[1], pause=0.01) as server:
        yield server


@pytest.fixture(scope="module")
def port(saved: str, engine: Any, served: Any) -> Iterator[int]:
    with served(mllm.load(saved, engine=engine.url), batch=32) as port:
        yield port


def post(port: int, text: str, **fields: Any) -> Response:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        request(connection, text, **fields)
        response = connection.getresponse()
        return Response(response.status, response.headers, response.read())


def request(connection: http.client.HTTPConnection, text: str, **fields: Any) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": text}], "max_tokens": 8, **fields})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})


def content(response: Response) -> str:
    assert response.status == 200, response
    return str(json.loads(response.body)["choices"][0]["message"]["content"])


def wait_until(condition: Callable[[], bool]) -> None:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < 20
        time.sleep(0.02)


def test_answers_of_many_clients_are_those_of_the_layers_here(saved: str, port: int, engine: Any, served: Any) -> None:
    questions = [f"question {number}" for number in range(12)]
    with served(mllm.load(saved)) as here:
        expected = [content(post(here, question)) for question in questions]
    engine.most_running = 0
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(lambda question: content(post(port, question)), questions)) == expected
    assert engine.most_running > 4


def test_an_answer_is_streamed(port: int) -> None:
    whole = content(post(port, "stream"))
    events = [line[6:] for line in post(port, "stream", stream=True).body.decode().splitlines() if line[:6] == "data: "]
    assert events.pop() == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events]
    assert "".join(deltas) == whole and len([delta for delta in deltas if delta]) > 1


def test_a_client_that_disconnects_cancels_at_the_engine(port: int, engine: Any) -> None:
    before, engine.options["pause"] = engine.cancelled, 0.5
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        request(connection, "endless", stream=True, max_tokens=150)
        with connection.getresponse():
            wait_until(lambda: engine.running == 1)
    wait_until(lambda: engine.cancelled == before + 1)
    engine.options["pause"] = 0.01


def test_an_engine_that_cannot_answer_gives_503_and_is_tried_again(port: int, engine: Any) -> None:
    engine.options["away"] = 500
    response = post(port, "hello")
    assert response.status == 503 and response.headers["Retry-After"] == "1"
    assert json.loads(response.body)["error"]["code"] == "engine_unavailable"
    engine.options["away"] = None
    assert post(port, "hello").status == 200


def test_an_option_that_the_engine_does_not_have_is_the_clients_error(port: int) -> None:
    assert post(port, "hello", temperature=0.001).status == 400


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite of 12 images with two questions each, asked two at a time."""
    folder = tmp_path_factory.mktemp("suite")
    rows = []
    for number in range(12):
        tiny_image(number).save(folder / f"{number}.png")
        rows += [f"{number}.png,{text} {number}?,yes" for text in ("what is", "which is the longer")]
    (folder / "questions.csv").write_text("\n".join(["image,question,answer", *rows]) + "\n")
    data = {"format": "table", "path": str(folder / "questions.csv"), "images": str(folder)}
    about = {"name": "two", "about": "", "data": data, "metrics": ["vqa/exact-match"], "batch_size": 2}
    about["decoding"] = {"max_new_tokens": 6}
    (folder / "suite.yaml").write_text(json.dumps(about))
    return folder / "suite.yaml"


def test_an_evaluation_has_the_same_file_with_many_batches_at_the_engine(
    saved: str, engine: Any, suite: Path, tmp_path: Path
) -> None:
    evaluate(mllm.load(saved), str(suite), out=tmp_path / "here", baselines=["blind"])
    engine.most_running = 0
    evaluate(mllm.load(saved, engine=engine.url), str(suite), out=tmp_path / "there", baselines=["blind"])
    assert engine.most_running > 8
    here, there = (tmp_path / name / "predictions.jsonl" for name in ("here", "there"))
    assert here.read_bytes() == there.read_bytes()


def test_an_evaluation_whose_engine_ended_continues(
    saved: str, stock: Any, tiny_parts: tuple[str, str], suite: Path, tmp_path: Path
) -> None:
    evaluate(mllm.load(saved), str(suite), out=tmp_path / "here", baselines=[])
    with stock(tiny_parts[1], pause=0.005) as server:
        model = mllm.load(saved, engine=server.url)
        server.asked.clear()
        server.options["budget"] = 13
        with pytest.raises(mllm.MLLMError, match="does not answer"):
            evaluate(model, str(suite), out=tmp_path / "there", baselines=[])
        (journal,) = (tmp_path / "there").glob("answers.*.partial.jsonl")
        answered = len(journal.read_text().splitlines()) - 1
        assert 0 < answered < 12
        server.options["budget"] = None
        server.asked.clear()
        evaluate(model, str(suite), out=tmp_path / "there", baselines=[])
    assert len(server.asked) == 24 - 2 * answered
    assert (tmp_path / "here" / "predictions.jsonl").read_bytes() == (
        tmp_path / "there" / "predictions.jsonl"
    ).read_bytes()


def test_an_image_of_a_request_is_encoded_here(saved: str, port: int, served: Any) -> None:
    buffer = io.BytesIO()
    tiny_image(3).save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    message = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    with served(mllm.load(saved)) as here:
        expected = content(post(here, "", messages=message))
    assert content(post(port, "", messages=message)) == expected


def test_the_bench_counts_clients_of_both(saved: str, engine: Any) -> None:
    models = [mllm.load(saved, engine=engine.url), mllm.load(saved)]
    bench = import_module("mllm.eval.bench.serve")
    lines: list[str] = []
    rate, late = bench.measured(models, 3, repeats=1, progress=lines.append, tokens=4)
    assert len(lines) == 4 and "engine" in lines[0] and "transformers" in lines[1]
    assert rate.ours < 3 / 0.04 and late.ours < 1 / 0.01  # its engine waits 0.01 seconds before each token
    assert rate.ratio == pytest.approx(rate.ours / rate.alternative)
