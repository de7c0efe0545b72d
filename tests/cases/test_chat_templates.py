"""Chat templates as instruct models have them: each prompt has the ids, the ends and the turns of the template."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mllm.data.readers.conversations import llava
from mllm.errors import MLLMError
from mllm.prompts.pieces import images_of
from mllm.testing import tiny_image

IMAGE = tiny_image(1)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


# A template that writes the BOS token, which the tokenizer would add as well (Llama 3, Gemma 3, Mistral).

BOS = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize("family", ["gemma", "llama", "opt"])
def test_a_prompt_has_the_ids_of_apply_chat_template(model_of, prompt_of, family):
    model = model_of(family, BOS)
    expected = model.lm.tokenizer.apply_chat_template(
        [user("hi")], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert model.encode(prompt_of(model, [user("hi")])).ids == expected["input_ids"]


@pytest.mark.parametrize("family", ["gemma", "llama", "opt"])
def test_a_training_example_has_one_bos(model_of, example_of, encoded, family):
    model = model_of(family, BOS)
    ids = encoded(model, example_of(model, [user("hi"), assistant("yo")])).ids
    assert ids.count(model.lm.tokenizer.bos_token_id) == 1


# An end of turn that is not the tokenizer's EOS token, named in generation_config.json (Gemma, Phi-3, Qwen2.5).

ENDED = (
    "{% for m in messages %}<start>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def ended(lm_folder, assemble):
    """A model whose turns end with a token of their own."""
    folder = lm_folder("llama", lambda t: t.add_tokens(["<end_of_turn>"], special_tokens=True), ENDED)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder)
    lm.resize_token_embeddings(len(tokenizer))
    lm.generation_config.eos_token_id = [
        tokenizer.eos_token_id,
        tokenizer.convert_tokens_to_ids("<end_of_turn>"),
    ]
    lm.generation_config.pad_token_id = tokenizer.eos_token_id
    lm.save_pretrained(folder)
    return assemble(folder, prompt={"chat": "own"})


@pytest.fixture(scope="module")
def ok_and_end(ended):
    """The ids of an answer of one token, and of the end of the turn."""
    tokenizer = ended.lm.tokenizer
    return tokenizer("o", add_special_tokens=False).input_ids[0], tokenizer.convert_tokens_to_ids("<end_of_turn>")


def test_generation_stops_at_the_end_of_turn_of_generation_config(ended, ok_and_end, prompt_of, scripted):
    with scripted(ended, *ok_and_end):
        stock = ended.lm.model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=12)[0, 3:].tolist()
    assert stock == list(ok_and_end)
    with scripted(ended, *ok_and_end) as script:
        ended.generate([prompt_of(ended, [user("hi")])], max_new_tokens=12)
    assert script.tokens == len(stock)


def test_the_end_that_is_learned_is_the_templates_own(ended, ok_and_end, example_of, encoded):
    labels = encoded(ended, example_of(ended, [user("hi"), assistant("ok")])).labels
    assert [label for label in labels if label != -100][-1] == ok_and_end[1]


def test_the_server_says_that_the_end_of_turn_stopped_the_answer(ended, ok_and_end, scripted, serve):
    client = serve(ended)
    with scripted(ended, *ok_and_end):
        _, body = client.ask("hi", max_tokens=12)
    assert json.loads(body)["choices"][0]["finish_reason"] == "stop"


# An end of turn that the tokenizer does not count as special: its text is never in an answer.


@pytest.fixture(scope="module")
def ended_by_a_word(lm_folder, assemble):
    """A model whose turns end with an added token that is not special."""
    folder = lm_folder("llama", lambda t: t.add_tokens(["<end_of_turn>"]), ENDED)
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder)
    lm.resize_token_embeddings(len(transformers.AutoTokenizer.from_pretrained(folder)))
    lm.save_pretrained(folder)
    return assemble(folder, prompt={"chat": "own"})


def test_the_end_of_turn_is_not_in_the_text_of_an_answer(ended_by_a_word, scripted, serve):
    tokenizer = ended_by_a_word.lm.tokenizer
    script = [*tokenizer("ooo", add_special_tokens=False).input_ids, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    client = serve(ended_by_a_word)
    answers = []
    for answer in (
        lambda: ended_by_a_word.chat().send("hi", max_new_tokens=9),
        lambda: "".join(ended_by_a_word.chat().stream("hi", max_new_tokens=9)),
        lambda: client.answer("hi", max_tokens=9),
        lambda: "".join(
            json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
            for line in client.ask("hi", max_tokens=9, stream=True)[1].splitlines()
            if line.startswith("data: {")
        ),
    ):
        with scripted(ended_by_a_word, *script):
            answers.append(answer())
    assert [set(answer) for answer in answers] == [{"o"}] * 4  # a chat's prefill takes the first token of the script


# A template that raises on a system turn and on roles that do not alternate (Gemma, Mistral, Llama 2).

STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<t>{{ m['role'] }}\n{{ m['content'] | trim }}</t>\n{% endfor %}"
    "{% if add_generation_prompt %}<t>model\n{% endif %}"
)


def test_a_chat_with_a_system_prompt_that_the_template_refuses(model_of):
    with pytest.raises(MLLMError, match="System role not supported"):
        model_of("bytes", STRICT).chat(system="Be brief.").send("hi", max_new_tokens=2)


@pytest.mark.parametrize(
    "messages",
    [
        pytest.param([system("x"), user("hi")], id="system"),
        pytest.param([user("a"), user("hi")], id="two-user-turns"),
        pytest.param([assistant("a"), user("hi")], id="assistant-first"),
    ],
)
def test_the_server_refuses_roles_that_the_template_refuses(model_of, serve, messages):
    status, body = serve(model_of("bytes", STRICT)).post({"messages": messages, "max_tokens": 2})
    reason = "System role not supported" if messages[0]["role"] == "system" else "roles must alternate"
    assert status == 400
    assert reason in json.loads(body)["error"]["message"]


def test_training_on_a_system_turn_that_the_template_refuses(model_of, example_of):
    messages = [system("x"), user([{"type": "image", "image": IMAGE}, {"type": "text", "text": "q"}]), assistant("a")]
    with pytest.raises(MLLMError, match="System role not supported"):
        example_of(model_of("bytes", STRICT), messages)


# Where an image stands in a conversation: among the words, in the system turn, in the assistant's turn.

ROLES = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHATS = [pytest.param(None, id="plain"), pytest.param(ROLES, id="own")]
images_keep_places = pytest.mark.parametrize("template", CHATS)


@pytest.fixture
def conversation(tmp_path, model_of, example_of, request):
    """Return a function that reads a conversation of LLaVA's format, and gives the example that is trained on."""
    for number in (1, 2):
        tiny_image(number).save(tmp_path / f"{number}.png")

    def example(model: Any, image: Any, *turns: tuple[str, str]) -> list[Any]:
        row = {"id": "1", "image": image, "conversations": [{"from": who, "value": text} for who, text in turns]}
        (tmp_path / "rows.json").write_text(json.dumps([row]))
        item = llava(path=str(tmp_path / "rows.json"), images=str(tmp_path))[0]
        return example_of(model, item.messages)

    return example


@images_keep_places
def test_two_images_stand_among_the_words_of_a_turn(model_of, conversation, as_text, template):
    question = "First <image> then <image>, which is larger?"
    example = conversation(model_of("bytes", template), ["1.png", "2.png"], ("human", question), ("gpt", "The second."))
    words = ["First", "<image>", "then", "<image>", "which"]
    text = as_text(example)
    for word in words:
        before, mark, text = text.partition(word)
        assert mark, f"{word} is missing, or before {before!r}"


@images_keep_places
@pytest.mark.parametrize(
    "turns",
    [
        pytest.param(
            [("human", "Draw me a cat."), ("gpt", "Here it is: <image> Do you like it?")], id="assistant's turn"
        ),
        pytest.param(
            [("system", "The logo is <image>."), ("human", "What is it?"), ("gpt", "A cat.")], id="system turn"
        ),
    ],
)
def test_an_image_of_another_turn_stands_where_it_is_marked(model_of, conversation, as_text, template, turns):
    example = conversation(model_of("bytes", template), "1.png", *turns)
    marked = next(text for _, text in turns if "<image>" in text)
    assert len(images_of(example)) == 1
    assert marked in as_text(example)


@images_keep_places
def test_the_server_puts_an_image_of_a_system_message_into_the_prompt(model_of, serve, data_url, template):
    model = model_of("bytes", template)
    logo = {"type": "text", "text": "logo:"}
    image = {"type": "image_url", "image_url": {"url": data_url(IMAGE)}}

    def prompt_tokens(*parts: Any) -> int:
        _, body = serve(model).post({"messages": [system(list(parts)), user("what?")], "max_tokens": 2})
        return int(json.loads(body)["usage"]["prompt_tokens"])

    assert prompt_tokens(logo, image) >= prompt_tokens(logo) + model.encode([IMAGE]).visual.count(True)


@images_keep_places
def test_the_parts_of_a_message_keep_their_order(model_of, prompt_of, as_text, template):
    parts = [
        {"type": "text", "text": "Image one:"},
        {"type": "image", "image": IMAGE},
        {"type": "text", "text": "Image two:"},
        {"type": "image", "image": tiny_image(2)},
    ]
    text = as_text(prompt_of(model_of("bytes", template), [user(parts)]))
    assert text.index("one") < text.index("<image>") < text.index("two")


# Templates that change or drop what a turn says: of parts alone (SmolVLM, Idefics 3), of strings or parts (Llama 3.2).

PARTS_ONLY = (
    "{% for message in messages %}<|im_start|>{{ message['role'] | capitalize }}: "
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
STRING_OR_PARTS = (
    "{% for message in messages %}<{{ message['role'] }}>{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for c in message['content'] %}{% if c['type'] == 'image' %}<image>"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TURNS = (
    "{{% for message in messages{} %}}<{{{{ message['role'] }}}}>{{{{ message['content']{} }}}}\n{{% endfor %}}"
    "{{% if add_generation_prompt %}}<assistant>{{% endif %}}"
)
NO_SYSTEM = TURNS.format(" if message['role'] != 'system'", "")
CAPITALIZED = TURNS.format("", " | capitalize")
UPPER = TURNS.format("", " | upper")


@pytest.fixture
def letters_first(monkeypatch):
    """Let a random mark, where one is put into a template, start with a letter: one that a template can capitalize."""
    monkeypatch.setattr(secrets, "token_hex", lambda size=8: "ab" * size)


changing_templates = pytest.mark.parametrize(
    "template",
    [
        pytest.param(PARTS_ONLY, id="parts-only"),
        pytest.param(STRING_OR_PARTS, id="string-or-parts"),
        pytest.param(CAPITALIZED, id="capitalized"),
        pytest.param(UPPER, id="upper"),
    ],
)


@changing_templates
def test_the_prompt_holds_every_turn(letters_first, model_of, prompt_of, as_text, template):
    messages = [
        system("Be brief."),
        user([{"type": "image", "image": IMAGE}, {"type": "text", "text": "What is THIS?"}]),
    ]
    text = as_text(prompt_of(model_of("bytes", template), messages)).lower()
    assert text.index("be brief.") < text.index("<image>what is this?")
    assert text.count("<image>") == 1


def test_a_turn_that_the_template_leaves_out_is_named(model_of, prompt_of):
    with pytest.raises(MLLMError, match=r"turn 1 \(system\)"):
        prompt_of(model_of("bytes", NO_SYSTEM), [system("Be brief."), user("What is it?")])


@changing_templates
def test_a_training_example_holds_its_answer(letters_first, model_of, example_of, as_text, template):
    example = example_of(model_of("bytes", template), [user("q"), assistant("the answer")])
    assert "the answer" in as_text(example).lower()


# Byte-level BPE that joins a template's words with those of a turn: the ids are those of the whole text.

CORPUS = [
    "[INST] What is it? [/INST] It is a red dog",
    "USER: What is it? ASSISTANT: a red dog\n",
    "Question: Is it red? Answer: no\n\n",
    "### Human: What is it?\n### Assistant: red dog",
] * 50
BY_ROLE = "{{% for m in messages %}}{{% if m['role'] == 'user' %}}{}{{% else %}}{}{{% endif %}}{{% endfor %}}"
GENERATION = "{{% if add_generation_prompt %}}{}{{% endif %}}"
FORMATS = {
    "llama-2": BY_ROLE.format("[INST] {{ m['content'] }} [/INST]", " {{ m['content'] }}{{ eos_token }}"),
    "vicuna": BY_ROLE.format("USER: {{ m['content'] }} ", "ASSISTANT: {{ m['content'] }}{{ eos_token }}")
    + GENERATION.format("ASSISTANT:"),
    "chatml": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    + GENERATION.format("<|im_start|>assistant\n"),
    "alpaca": BY_ROLE.format("### Human: {{ m['content'] }}\n", "### Assistant: {{ m['content'] }}\n")
    + GENERATION.format("### Assistant:"),
}
TEXTS = {"plain": "What is it?", "newline-last": "What is it?\n", "newline-first": "\nWhat is it?"}


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model whose tokenizer joins bytes to words, as GPT-2's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    folder = tmp_path_factory.mktemp("bpe")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    fast.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=256,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bpe_models(bpe_folder, assemble):
    """By format, a model with a tokenizer of byte-level BPE and the format's chat template."""

    def model(template: str) -> Any:
        tokenizer = transformers.AutoTokenizer.from_pretrained(bpe_folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(bpe_folder)
        return assemble(str(bpe_folder), prompt={"chat": "own"})

    return {name: model(template) for name, template in FORMATS.items()}


@pytest.mark.parametrize(
    ("name", "text"),
    [pytest.param(name, text, id=f"{name}-{kind}") for name in FORMATS for kind, text in TEXTS.items()],
)
def test_a_turns_text_has_the_ids_of_apply_chat_template(bpe_models, prompt_of, name, text):
    model = bpe_models[name]
    expected = model.lm.tokenizer.apply_chat_template(
        [user(text)], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    assert model.encode(prompt_of(model, [user(text)])).ids == expected["input_ids"]


@pytest.mark.parametrize("name", FORMATS)
def test_the_first_token_learned_is_that_of_apply_chat_template(bpe_models, example_of, encoded, name):
    model = bpe_models[name]
    messages = [user("What is it?"), assistant("a red dog")]
    tokens = model.lm.tokenizer.convert_ids_to_tokens
    stock = tokens(model.lm.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])
    labels = [label for label in encoded(model, example_of(model, messages)).labels if label != -100]
    first = [token for token in stock if token in ("a", "Ġa")][-1]
    assert tokens(labels)[0] == first
