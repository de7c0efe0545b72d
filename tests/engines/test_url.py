"""An engine at a URL: the answers are those of the layers here, and what is wrong there is one message."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mllm
from mllm.engines.base import EngineError
from mllm.errors import MLLMError
from mllm.testing import tiny_image, tiny_lm

IMAGE, OTHER = tiny_image(1), tiny_image(2)
PROMPTS: list[list[Any]] = [
    ["Once upon a time"],
    [IMAGE, "A picture of"],
    ["First", IMAGE, "then", OTHER, "and?"],
    ["x" * 40, OTHER],
]


@pytest.fixture(scope="module")
def server(stock: Any, tiny_parts: tuple[str, str]) -> Iterator[Any]:
    with stock(tiny_parts[1]) as running:
        yield running


@pytest.fixture(scope="module")
def local(saved: str) -> Any:
    return mllm.load(saved)


@pytest.fixture(scope="module")
def remote(saved: str, server: Any) -> Any:
    return mllm.load(saved, engine=server.url)


def texts(model: Any, **options: Any) -> list[str]:
    return [str(answer) for answer in model.generate(PROMPTS, max_new_tokens=12, **options)]


def test_answers_are_those_of_the_layers_here(local: Any, remote: Any) -> None:
    assert texts(remote) == texts(local)
    assert [str(remote.generate([prompt], max_new_tokens=12)[0]) for prompt in PROMPTS] == texts(local)


def test_no_layer_is_loaded_here(local: Any, remote: Any) -> None:
    held = {name: tensor for name, tensor in remote.named_parameters() if name.startswith("lm.")}
    assert list(held) == ["lm.table.weight"] and not held["lm.table.weight"].is_meta
    assert all(p.is_meta for name, p in remote.lm.model.named_parameters() if "embed_tokens" not in name)
    assert remote.lm.fingerprint == local.lm.fingerprint


def test_many_questions_on_an_image_and_a_chat(local: Any, remote: Any) -> None:
    for model in (local, remote):
        views = model.see_each([[IMAGE], [OTHER, "so"]])
        model.answers = views.continue_with([["a", " longer question?"], ["b"]], max_new_tokens=6)
        chat = model.chat()
        model.turns = [chat.send("What?", [IMAGE], max_new_tokens=5), "".join(chat.stream("And?", max_new_tokens=5))]
        model.turns.append(chat.send("Both?", [OTHER], max_new_tokens=5))
    assert remote.answers == local.answers and remote.turns == local.turns


def test_the_engine_gets_the_embeddings_of_the_prompt_and_the_options(local: Any, remote: Any, server: Any) -> None:
    server.asked.clear()
    remote.generate([PROMPTS[1]], max_new_tokens=3, temperature=0.5, top_p=0.9, top_k=5, seed=7, stop_strings=["x"])
    (body,) = server.asked
    embeds, batch = local.prepare([PROMPTS[1]])
    torch.testing.assert_close(body["prompt_embeds"], embeds[0][batch.mask[0].bool()])
    wanted = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 7, "stop": ["x"], "max_tokens": 3}
    assert {name: body[name] for name in wanted} == wanted and body["repetition_penalty"] == 1
    assert body["stop_token_ids"] == [local.lm.eos] and body["ignore_eos"] and body["stream"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 2),
        ("repetition_penalty", 1.2),
        ("no_repeat_ngram_size", 2),
        ("typical_p", 0.5),
        ("suppress_tokens", [3]),
        ("max_time", 5),
        ("contrastive", {}),
    ],
)
def test_options_that_an_engine_does_not_have_are_refused_by_name(remote: Any, name: str, value: Any) -> None:
    with pytest.raises(MLLMError, match=f"{name}.*transformers"):
        remote.generate([PROMPTS[1]], **{name: value})


def test_scores_are_refused(remote: Any) -> None:
    with pytest.raises(MLLMError, match="engine: transformers"):
        remote.score([IMAGE, "A picture of"], ["a cat", "a dog"])


def test_a_batch_is_at_the_engine_at_the_same_time(saved: str, stock: Any, tiny_parts: tuple[str, str]) -> None:
    with stock(tiny_parts[1], pause=0.2) as slow:
        mllm.load(saved, engine=slow.url).generate([[f"text {n}"] for n in range(8)], max_new_tokens=4)
    assert slow.most_running > 4  # one after another it would be 1


def test_several_urls_share_the_work_and_one_that_ends_is_left_out(
    saved: str, local: Any, stock: Any, tiny_parts: tuple[str, str]
) -> None:
    with stock(tiny_parts[1], pause=0.02) as first:
        with stock(tiny_parts[1], pause=0.02) as second:
            model = mllm.load(saved, engine=[first.url, second.url])
            first.asked.clear()
            second.asked.clear()
            assert texts(model) == texts(local)
            assert len(first.asked) == len(second.asked) == 2
        assert texts(model) == texts(local)
    with pytest.raises(EngineError, match=r"127\.0\.0\.1.*127\.0\.0\.1"):
        texts(model)
    with stock(tiny_parts[1], port=first.server_port):  # it is tried again
        assert texts(model) == texts(local)


def test_an_engine_that_ends_within_an_answer_is_an_error(saved: str, stock: Any, tiny_parts: tuple[str, str]) -> None:
    with stock(tiny_parts[1]) as server:
        model = mllm.load(saved, engine=server.url)
        server.options["most"] = 2
        with pytest.raises(EngineError, match="does not answer"):
            model.generate([PROMPTS[1]], max_new_tokens=8, min_new_tokens=8)


def test_a_cancelled_request_ends_at_the_engine(saved: str, stock: Any, tiny_parts: tuple[str, str]) -> None:
    with stock(tiny_parts[1]) as server:
        model = mllm.load(saved, engine=server.url)
        server.options["pause"] = 0.05
        started, stop = time.monotonic(), threading.Event()
        threading.Timer(0.3, stop.set).start()
        (answer,) = model.generate([["endless"]], max_new_tokens=200, cancelled=stop.is_set)
        assert time.monotonic() - started < 5 and answer.num_tokens < 100
        while not server.cancelled:
            assert time.monotonic() - started < 5
            time.sleep(0.02)


def other_lm(folder: Path, **options: Any) -> str:
    return tiny_lm(folder / "other", **options)


def other_vocabulary(folder: Path) -> str:
    from transformers import AutoTokenizer

    path = tiny_lm(folder / "other")
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    tokenizer.add_tokens(["quick"])
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: other_lm(folder, seed=1), "other weights"),
        (other_vocabulary, "vocabulary"),
        (lambda folder: other_lm(folder, dim=64), "hidden_size"),
        (lambda folder: other_lm(folder, seed=1), "another language model"),
    ],
)
def test_an_engine_of_another_language_model_is_refused(
    make: Callable[[Path], str], message: str, saved: str, stock: Any, tmp_path: Path
) -> None:
    root = {} if message == "other weights" else {"root": "elsewhere"}  # a folder that cannot be read here
    with stock(make(tmp_path), **root) as server, pytest.raises(MLLMError, match=message):
        mllm.load(saved, engine=server.url)


def test_a_prompt_longer_than_the_engines_context_is_refused(
    saved: str, stock: Any, tiny_parts: tuple[str, str]
) -> None:
    with stock(tiny_parts[1], context=120) as server:
        model = mllm.load(saved, engine=server.url)
        assert model.lm.context == 120
        with pytest.raises(MLLMError, match="120"):
            model.generate([["x" * 119, IMAGE]])
        with pytest.raises(MLLMError, match="120 tokens, of which 20 remain"):
            model.generate([["x" * 100]], max_new_tokens=30)


def test_no_engine_at_a_url_is_one_message(saved: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    with pytest.raises(MLLMError, match=f"No engine answers at {url}.*vllm serve"):
        mllm.load(saved, engine=url)


def test_a_url_of_something_else_is_one_message(saved: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            connection.recv(1000)
            connection.sendall(b"220 mail.example.org ESMTP\r\n")
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(MLLMError, match="No engine answers at http"):
            mllm.load(saved, engine=f"http://127.0.0.1:{listening.getsockname()[1]}")
