"""Conversations that are learnt: read from their authors' files, and put as a chat puts them."""

from __future__ import annotations

import json
from collections.abc import Callable
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
from mllm.prompts.pieces import Target
from mllm.testing import tiny_image

SAID = [
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


def read(folder: Path, *rows: dict[str, Any]) -> list[Item]:
    (folder / "data.json").write_text(json.dumps(rows))
    return llava(path=str(folder / "data.json"), images=str(folder))


def test_llavas_json_becomes_messages(folder: Path) -> None:
    first, second, third = read(
        folder,
        {"id": "a", "image": "0.png", "conversations": SAID},
        {"id": "b", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"image": ["1.png", "2.png"], "conversations": [{**SAID[0], "value": "Same?"}, SAID[1]]},
    )
    picture = ImageFile(folder / "0.png")
    assert (first.id, second.id, third.id) == ("a", "b", "2")
    assert first.images == (picture,) and second.images == ()
    assert first.messages[0]["content"] == [
        {"type": "image", "image": picture},
        {"type": "text", "text": "What is it?"},
    ]
    assert [m["role"] for m in first.messages] == ["user", "assistant"] * 2
    assert [part["type"] for part in third.messages[0]["content"]] == ["image", "image", "text"]


def test_messages_in_transformers_schema(folder: Path) -> None:
    picture = [ImageFile(folder / f"{index}.png") for index in range(3)]
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
    assert first.images == (picture[0], picture[1]) and second.images == (picture[1], picture[2])
    shown = [part.get("image") or part["text"] for part in second.messages[1]["content"]]
    assert shown == ["First", picture[1], "or", picture[2]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"image": "0.png", "conversations": [{**SAID[0], "value": "<image><image>"}, SAID[1]]},
            "2 marks <image> for 1",
        ),
        ({"conversations": SAID}, "1 marks <image> for 0 images"),
        ({"image": "0.png", "conversations": SAID[:1]}, "nothing is answered"),
        ({"image": "9.png", "conversations": SAID}, r"not there: .*9\.png"),
        ({"image": "../0.png", "conversations": SAID}, "outside of"),
        ({"image": "0.png", "conversations": [{"from": "robot", "value": "x"}]}, "of another form"),
    ],
)
def test_conversations_with_something_wrong(folder: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(MLLMError, match=message):
        read(folder, row)


@pytest.mark.parametrize("chat", ["plain", "own"])
def test_what_is_learnt_is_what_a_chat_puts(folder: Path, tiny_model: Callable[..., Any], chat: str) -> None:
    model = tiny_model({"type": "linear", "tokens": 4})
    model.spec.prompt.chat = chat
    lm = model.lm
    lm.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (item,) = read(folder, {"id": "a", "image": "0.png", "conversations": SAID})
    learnt = model.encode(pieces_of(item, model.spec.prompt, lm=lm))
    asked = model.encode(turns(model, checked_messages(item.messages[:3])))  # a chat before its second answer
    assert learnt.ids[: len(asked.ids)] == asked.ids
    answer = "two" if chat == "own" else " two"
    assert learnt.ids[len(asked.ids) :] == [*lm.tokenize(answer), lm.eos]
    # Each answer and its end are targets, and nothing else: what a chat has in the end's place is not learnt.
    runs = [lm.tokenize(answer.replace("two", "A cat.")), lm.tokenize(answer)]
    assert [label for label in learnt.labels if label != IGNORED] == [*runs[0], lm.eos, *runs[1], lm.eos]
    at = learnt.labels.index(runs[0][0])
    assert learnt.ids[at : at + len(runs[0])] == runs[0] and learnt.labels[at + len(runs[0])] == lm.eos
    assert isinstance(pieces_of(item, model.spec.prompt, lm=lm)[-1], Target)


def test_a_conversation_is_learnt_by_heart(folder: Path, tiny_parts: tuple[str, str]) -> None:
    (folder / "data.json").write_text(json.dumps([{"id": "a", "image": "0.png", "conversations": SAID}]))
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


def test_the_first_stage_of_llava_discards_what_is_asked(folder: Path) -> None:
    (folder / "data.json").write_text(json.dumps([{"id": "a", "image": "0.png", "conversations": SAID[:2]}]))
    options = {"path": str(folder / "data.json"), "images": str(folder)}
    (item,) = llava(**options, task="captions")
    assert (item.answers, item.question, item.messages) == (("A cat.",), None, ())
    (folder / "data.json").write_text(json.dumps([{"id": "b", "conversations": [{**SAID[0], "value": "Hi"}, SAID[1]]}]))
    with pytest.raises(MLLMError, match=r"'b': 0 images; a caption needs one image"):
        llava(**options, task="captions")
