"""Test conversations to train on: read from published formats, and formatted like a chat."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import mllm
from mllm.data.items import Item, pieces_of
from mllm.data.readers.conversations import llava, messages
from mllm.errors import MLLMError
from mllm.media.images import ImageFile
from mllm.prompts.batch import IGNORED
from mllm.prompts.messages import checked_messages, turns
from mllm.prompts.pieces import Target, Template
from mllm.testing import tiny_image

TURNS = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A cat."},
    {"from": "human", "value": "How many?"},
    {"from": "gpt", "value": "two"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(3):
        tiny_image(index).save(tmp_path / f"{index}.png")
    return tmp_path


def read(folder: Path, *rows: dict[str, Any]) -> Sequence[Item]:
    (folder / "data.json").write_text(json.dumps(rows))
    return llava(path=str(folder / "data.json"), images=str(folder))


def test_llava_json_becomes_messages(folder: Path) -> None:
    first, second, third = read(
        folder,
        {"id": "a", "image": "0.png", "conversations": TURNS},
        {"id": "b", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"image": ["1.png", "2.png"], "conversations": [{**TURNS[0], "value": "Same?"}, TURNS[1]]},
    )
    image = ImageFile(folder / "0.png")
    assert (first.id, second.id, third.id) == ("a", "b", "2")
    assert first.images == (image,) and second.images == ()
    assert first.messages[0]["content"] == [
        {"type": "image", "image": image},
        {"type": "text", "text": "What is it?"},
    ]
    assert [m["role"] for m in first.messages] == ["user", "assistant"] * 2
    assert [part["type"] for part in third.messages[0]["content"]] == ["image", "image", "text"]


def test_messages_in_transformers_schema(folder: Path) -> None:
    image = [ImageFile(folder / f"{index}.png") for index in range(3)]
    parts = [{"type": "text", "text": "First"}, {"type": "image"}, {"type": "text", "text": "or"}]
    rows = [
        {"messages": [{"role": "user", "content": "<image>or<image>?"}, {"role": "assistant", "content": "one"}]}
        | {"images": ["0.png", "1.png"]},
        {
            "messages": [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": [*parts, {"type": "image", "path": "2.png"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
            ],
            "images": ["1.png"],
        },
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second = messages(path=str(folder / "data.jsonl"), images=str(folder))
    assert first.images == (image[0], image[1]) and second.images == (image[1], image[2])
    shown = [part.get("image") or part["text"] for part in second.messages[1]["content"]]
    assert shown == ["First", image[1], "or", image[2]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"image": "0.png", "conversations": [{**TURNS[0], "value": "<image><image>"}, TURNS[1]]},
            "2 marks <image> for 1",
        ),
        ({"conversations": TURNS}, "1 marks <image> for 0 images"),
        ({"image": "0.png", "conversations": TURNS[:1]}, "no turn of the assistant has text"),
        ({"image": "9.png", "conversations": TURNS}, r"images are missing: .*9\.png"),
        ({"image": "../0.png", "conversations": TURNS}, "outside of"),
        ({"image": "0.png", "conversations": [{"from": "robot", "value": "x"}]}, "row 1: no role is called 'robot'"),
    ],
)
def test_malformed_conversations_are_refused(folder: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(MLLMError, match=message):
        read(folder, row)


@pytest.mark.parametrize("chat", ["plain", "own"])
def test_targets_are_the_answers_in_the_chat_format(folder: Path, tiny_model: Callable[..., Any], chat: str) -> None:
    model = tiny_model({"type": "linear", "tokens": 4})
    model.spec.prompt.chat = chat
    lm = model.lm
    lm.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (item,) = read(folder, {"id": "a", "image": "0.png", "conversations": TURNS})
    encoded = model.encode(pieces_of(item, model.spec.prompt, lm=lm))
    asked = model.encode(turns(model, checked_messages(item.messages[:3])))  # a chat before its second answer
    assert encoded.ids[: len(asked.ids)] == asked.ids
    answer = "two" if chat == "own" else " two"
    assert encoded.ids[len(asked.ids) :] == [*lm.tokenize(answer), lm.eos]
    # The targets are each answer and its end, and nothing else of the chat template.
    runs = [lm.tokenize(answer.replace("two", "A cat.")), lm.tokenize(answer)]
    assert [label for label in encoded.labels if label != IGNORED] == [*runs[0], lm.eos, *runs[1], lm.eos]
    at = encoded.labels.index(runs[0][0])
    assert encoded.ids[at : at + len(runs[0])] == runs[0] and encoded.labels[at + len(runs[0])] == lm.eos
    last = pieces_of(item, model.spec.prompt, lm=lm)[-1]
    assert last == (Template("<|end|>", learned=True) if chat == "own" else Target(answer))


def test_a_conversation_is_memorized(folder: Path, tiny_parts: tuple[str, str]) -> None:
    (folder / "data.json").write_text(json.dumps([{"id": "a", "image": "0.png", "conversations": TURNS}]))
    recipe = f"""name: talk
encoder: {{model: {tiny_parts[0]}}}
lm: {{model: {tiny_parts[1]}}}
connector: {{type: linear, tokens: 4}}
adapters: [{{type: lora, r: 16, alpha: 32}}]
data: {{train: {{format: llava, path: {folder}/data.json, images: {folder}}}}}
optim: {{schedule: constant, warmup: 0}}
stages:
  - {{name: talk, train: {{connector: 0.01, adapters: 0.02}}, steps: 150, batch_size: 2}}
"""
    (folder / "talk.yaml").write_text(recipe)
    torch.manual_seed(0)
    run = mllm.train(str(folder / "talk.yaml"), out=folder / "run")
    chat = mllm.load(run.path).chat()
    assert chat.send("What is it?", [folder / "0.png"], max_new_tokens=12) == "A cat."
    assert chat.send("How many?", max_new_tokens=12) == "two"


def test_captions_of_llava_discard_the_question(folder: Path) -> None:
    (folder / "data.json").write_text(json.dumps([{"id": "a", "image": "0.png", "conversations": TURNS[:2]}]))
    options = {"path": str(folder / "data.json"), "images": str(folder)}
    (item,) = llava(**options, task="captions")
    assert (item.answers, item.question, item.messages) == (("A cat.",), None, ())
    (folder / "data.json").write_text(
        json.dumps([{"id": "b", "conversations": [{**TURNS[0], "value": "Hi"}, TURNS[1]]}])
    )
    with pytest.raises(MLLMError, match=r"row 1: 0 images; a caption needs one image"):
        llava(**options, task="captions")
