"""Conversations with an exported model: the tokens are those of the training, and so are the answers."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from transformers import AutoProcessor, AutoTokenizer

import mllm
from mllm.export.chat import chat_template
from mllm.export.export import export
from mllm.prompts.messages import checked_messages, turns
from mllm.testing import LM_FAMILIES, tiny_encoder, tiny_image, tiny_lm

A, B = tiny_image(1), tiny_image(2)
DECODING = {"max_new_tokens": 8, "min_new_tokens": 8}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}\n"
)
# A template that takes the system message out, loops with an index, and ends without a line break.
LLAMA2 = (
    "{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}\n"
    "{%- for message in rest %}\n"
    "    {%- if message.role == 'user' %}[INST] {% if loop.first and system %}<<SYS>>{{ system }}<</SYS>> {% endif %}"
    "{{ message.content }} [/INST]{% else %} {{ message.content }} {% endif %}\n"
    "{%- endfor %}"
)


def image(content: Any) -> dict[str, Any]:
    return {"type": "image", "image": content}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [text(content)]}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "an image first": [user(image(A), text("what is it?"))],
    "an image last": [user(text("  what is it? "), image(A))],
    "images between texts": [user(text("first"), image(A), text("second"), image(B), text("which?"))],
    "images alone": [user(image(A), image(B))],
    "text alone": [user(text("hello {{ there }} \\n 'quoted' \"twice\""))],
    "several turns": [
        user(image(A), text("what is it?")),
        assistant("  a house "),
        user(text("and?")),
        assistant("no"),
        user(text("this"), image(B)),
    ],
    "a system message": [{"role": "system", "content": [text("Be brief. ")]}, user(image(B), text("a bird?"))],
}
PROMPTS: dict[str, dict[str, Any]] = {
    "plain": {"chat": "plain"},
    "plain with other words": {
        "chat": "plain",
        "template": "USER: {images} Ä\t'x' {prompt}",
        "question": 'Say "{question}"\nNow: 😀',
        "caption": "A photo\\of",
    },
    "turns": {"turn": "USER: {images}\n{question} ASSISTANT:", "system": "A chat. "},
    "ChatML": {"chat": "own", "template_of_lm": CHATML},
    "ChatML with a system prompt": {"chat": "own", "system": "Be kind.", "template_of_lm": CHATML},
    "Llama-2": {"chat": "own", "template_of_lm": LLAMA2},
}


@pytest.fixture(scope="module", params=["hf-llava", "hf-blip2"])
def to(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=PROMPTS)
def exported(request, to, tmp_path_factory):
    """Return a model and its folder."""
    folder = tmp_path_factory.mktemp("exported")
    prompt = dict(PROMPTS[request.param])
    lm = tiny_lm(folder / "lm")
    tokenizer = AutoTokenizer.from_pretrained(lm)
    tokenizer.chat_template = prompt.pop("template_of_lm", None)
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(lm)
    encoder = {"model": tiny_encoder(folder / "vit"), **({"layer": -1} if to == "hf-llava" else {"select": "all"})}
    qformer = {"type": "qformer", "tokens": 4, "dim": 16, "layers": 2, "heads": 2, "norm": False}
    connector = "linear" if to == "hf-llava" else qformer
    model = mllm.assemble(encoder, lm, connector, prompt=prompt)
    export(model, folder / "out", to=to)
    return model, folder / "out"


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_tokens_are_those_of_the_training(exported, name):
    model, folder = exported
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    messages = CONVERSATIONS[name]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    encoded = model.encode(turns(model, checked_messages(messages)))
    is_image = [token == processor.image_token_id for token in inputs["input_ids"][0]]
    assert is_image == encoded.visual
    assert [i for i in inputs["input_ids"][0] if i != processor.image_token_id] == [
        i for i, visual in zip(encoded.ids, encoded.visual, strict=True) if not visual
    ]


@pytest.mark.parametrize("name", ["images between texts", "several turns", "text alone"])
def test_a_pipeline_gives_the_answers_of_the_model(exported, name):
    model, folder = exported
    if name == "text alone" and model.spec.connector.type == "qformer":
        pytest.skip("BLIP-2's class generates with images only")
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    pipeline: Any = transformers.pipeline("image-text-to-text", model=str(folder), processor=processor)
    messages = CONVERSATIONS[name]
    answer = pipeline(text=messages, generate_kwargs=DECODING, return_full_text=False)
    expected = str(model.generate([turns(model, checked_messages(messages))], **DECODING)[0])
    assert answer[0]["generated_text"].strip() == expected.strip()


def test_a_pipeline_of_the_folder_alone_takes_messages(exported):
    _, folder = exported
    pipeline: Any = transformers.pipeline("image-text-to-text", model=str(folder))
    answer = pipeline(text=CONVERSATIONS["an image first"], generate_kwargs=DECODING)
    assert answer[0]["generated_text"][-1]["role"] == "assistant"


START = "<|start|>"
WITH_START = "{{ bos_token }}{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"


@pytest.mark.parametrize("start", ["{{ bos_token }}", START])
def test_a_template_with_a_start_token_gives_one_however_it_is_used(start, tmp_path):
    """Rendered first or tokenized at once, the ids are those of the tokenizer's own template: it starts with one."""
    lm = LM_FAMILIES["llama"](tmp_path / "lm")
    tokenizer = AutoTokenizer.from_pretrained(lm)
    tokenizer.chat_template = WITH_START.replace("{{ bos_token }}", start)
    tokenizer.save_pretrained(lm)
    encoder = {"model": tiny_encoder(tmp_path / "vit"), "layer": -1}
    model = mllm.assemble(encoder, lm, "linear", prompt={"chat": "own"})
    template = chat_template(model, "<image>")
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    wanted = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    tokenizer.chat_template = template
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert wanted.count(tokenizer.bos_token_id) == 1
    assert tokenizer(rendered).input_ids == wanted


def test_a_template_that_writes_images_itself_writes_the_name_of_the_export(tmp_path):
    lm = tiny_lm(tmp_path / "lm")
    tokenizer = AutoTokenizer.from_pretrained(lm)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}:{% for part in message.content %}"
        "{% if part.type == 'image' %}<|vision|>{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}\n"
        "{% endfor %}"
    )
    tokenizer.save_pretrained(lm)
    encoder = {"model": tiny_encoder(tmp_path / "vit"), "layer": -1}
    tokenizer.chat_template = chat_template(mllm.assemble(encoder, lm, "linear", prompt={"chat": "own"}), "<image>")
    messages = CONVERSATIONS["images between texts"]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "user:first<image>second<image>which?"
