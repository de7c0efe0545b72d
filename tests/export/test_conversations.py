"""Conversations with an exported model: the tokens are those of the training, and so are the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

import mllm
from mllm.errors import MLLMError
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
    "{{ message.content | trim }} [/INST]{% else %} {{ message.content }} {% endif %}\n"
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
    "blank texts": [user(text(" "), image(A), text(" "), image(B), text(""), text(" what? ")), assistant(" ")],
    "an image in every role": [
        {"role": "system", "content": [text("Like this:"), image(A)]},
        user(image(B), text("what?"), image(A), text(" Now.")),
        {"role": "assistant", "content": [image(B), text("this"), text("or"), image(A)]},
        user(text("why?")),
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
    "plain after examples": {
        "chat": "plain",
        "template": "{images}$image {prompt}",
        "examples": [{"words": "a dog", "question": "a 'bird'?", "answer": "{{ no }}"}, {"words": "x", "answer": "y"}],
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
    lm = tiny_lm(folder / "lm", context=512)
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


def test_a_start_token_stays_where_the_text_behind_it_is_tokenized_by_it(tmp_path):
    """A tokenizer that puts a space before the first text alone: the processor then adds no start token."""
    lm = LM_FAMILIES["llama"](tmp_path / "lm")
    tokenizer: Any = AutoTokenizer.from_pretrained(lm)
    spaces = pre_tokenizers.Metaspace(replacement="_", prepend_scheme="first")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [spaces, tokenizer.backend_tokenizer.pre_tokenizer]
    )
    tokenizer.chat_template = WITH_START
    tokenizer.save_pretrained(lm)
    encoder = {"model": tiny_encoder(tmp_path / "vit"), "layer": -1}
    template = chat_template(mllm.assemble(encoder, lm, "linear", prompt={"chat": "own"}), "<image>")
    messages = [{"role": "user", "content": "hello"}]
    wanted = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    tokenizer.chat_template = template
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered.startswith(tokenizer.bos_token)
    assert tokenizer(rendered, add_special_tokens=False).input_ids == wanted
    assert tokenizer(rendered.removeprefix(tokenizer.bos_token)).input_ids != wanted


def with_template(template: str, folder: Path, **prompt: Any) -> Any:
    """Return a model with a chat template."""
    lm = tiny_lm(folder / "lm")
    tokenizer = AutoTokenizer.from_pretrained(lm)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(lm)
    return mllm.assemble({"model": tiny_encoder(folder / "vit"), "layer": -1}, lm, "linear", prompt=prompt)


PARTS = (
    "{% for message in messages %}{{ message.role }}:{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}\n"
    "{% endfor %}"
)


def test_the_template_of_the_default_is_the_language_models(tmp_path):
    tokenizer = with_template(CHATML, tmp_path).lm.tokenizer
    wanted = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    tokenizer.chat_template = chat_template(with_template(CHATML, tmp_path / "again"), "<image>")
    assert tokenizer.apply_chat_template([user(text("hello"))], tokenize=False) == wanted


def test_options_of_the_recipe_are_the_defaults_of_the_template(tmp_path):
    reading = "{% macro shown() %}{{ mode ~ day ~ extra }}{% endmacro %}{{ shown() }}" + CHATML
    options = {"mode": None, "day": 'it\'s "1"\n\\', "extra": {"a": [True, 1.5, None]}, "unread": False}
    model = with_template(reading, tmp_path, chat="own", chat_options=options)
    tokenizer, messages = model.lm.tokenizer, [{"role": "user", "content": "hello"}]
    wanted = [
        tokenizer.apply_chat_template(messages, tokenize=False, **values) for values in (options, {**options, "day": 2})
    ]
    tokenizer.chat_template = chat_template(model, "<image>")
    assert tokenizer.apply_chat_template(messages, tokenize=False) == wanted[0]
    assert tokenizer.apply_chat_template(messages, tokenize=False, day=2) == wanted[1] != wanted[0]


def test_images_that_the_template_writes_in_several_ways_are_refused(tmp_path):
    numbered = PARTS.replace("{{ message.role }}:", "{% set turn = loop.index %}").replace("IMAGE", "<of {{ turn }}>")
    model = with_template(numbered, tmp_path, chat="own")
    with pytest.raises(MLLMError, match="writes images in several ways"):
        export(model, tmp_path / "out", to="hf-llava")
    assert not (tmp_path / "out").exists()


def test_examples_with_images_are_refused(tmp_path):
    A.save(tmp_path / "a.png")
    examples = [{"image": str(tmp_path / "a.png"), "answer": "a house"}]
    model = with_template(CHATML, tmp_path, chat="plain", examples=examples)
    with pytest.raises(MLLMError, match=r"solved examples \(prompt.examples\) have images"):
        export(model, tmp_path / "out", to="hf-llava")


def test_a_template_that_writes_images_itself_writes_the_name_of_the_export(tmp_path):
    model = with_template(PARTS.replace("IMAGE", "<|vision|>"), tmp_path, chat="own")
    tokenizer = model.lm.tokenizer
    tokenizer.chat_template = chat_template(model, "<image>")
    messages = CONVERSATIONS["images between texts"]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "user:first<image>second<image>which?"


@pytest.mark.parametrize("first", ["<|vision|>", "<|vision_start|><|vision|><|vision_end|>"])
def test_of_three_tokens_for_an_image_the_outer_ones_stay(first, tmp_path):
    lm = tiny_lm(tmp_path / "lm")
    tokenizer: Any = AutoTokenizer.from_pretrained(lm)
    tokenizer.add_tokens([f"<|vision{word}|>" for word in ("_start", "", "_end")], special_tokens=True)
    tokenizer.chat_template = PARTS.replace("IMAGE", first)
    tokenizer.save_pretrained(lm)
    language_model: Any = AutoModelForCausalLM.from_pretrained(lm)
    language_model.resize_token_embeddings(len(tokenizer))
    language_model.save_pretrained(lm)
    encoder = {"model": tiny_encoder(tmp_path / "vit"), "layer": -1}
    export(mllm.assemble(encoder, lm, "linear", prompt={"chat": "own"}), tmp_path / "out", to="hf-llava")
    processor = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    messages = CONVERSATIONS["images between texts"]
    image_text = first.replace("<|vision|>", "<image>")
    assert processor.apply_chat_template(messages) == f"user:first{image_text}second{image_text}which?"
