"""Conversations in the chat templates in use: the same ids, targets, prompts and ends as the tokenizer's own.

The templates of ``templates/`` have the forms of published ones, with other words; each row of `FORMS` says what is
publicly known about one: its special tokens, the words before an answer that the model generates, and its end of turn.
What is right is computed by ``apply_chat_template`` of `transformers`, and by the tokenizer's offsets in its text.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers
from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import mllm
from mllm.errors import MLLMError
from mllm.export.export import export
from mllm.testing import tiny_image

TEMPLATES = Path(__file__).parent / "templates"
IMAGE = tiny_image(1)
CORPUS = ["What is it? A red dog.", "Be brief. And its colour? Red, I think.", "user assistant system Response:"] * 40


@dataclass(frozen=True)
class Form:
    """What is known about a chat template.

    Attributes:
        kind: of the tokenizer: ``bytes`` (as GPT-2), ``legacy`` (a space put first, as Llama 2), ``spaces`` (as Gemma).
        bos: the BOS token, or None.
        eos: the EOS token.
        end: what ends a turn of the assistant in a text of several turns.
        specials: the template's other special tokens.
        lead: what is generated before the last answer's text.
        tail: what is generated between an answer's text and the end.
        last_end: what ends the last turn, where it is not in the template's text.
        image: what the template writes for an image, or None where it takes texts only.
        system: whether a conversation that ends with an answer may have a system turn.
        options: of the template.
        thinks: whether ``<think>`` and ``</think>`` are tokens, which are not special.
    """

    kind: str
    bos: str | None
    eos: str
    end: str
    specials: tuple[str, ...] = ()
    lead: str = ""
    tail: str = ""
    last_end: str | None = None
    image: str | None = None
    system: bool = True
    options: tuple[tuple[str, Any], ...] = ()
    thinks: bool = False


CHATML = ("<|im_start|>", "<|im_end|>")
LLAMA_3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
COMMAND = tuple(f"<|{name}_TOKEN|>" for name in ("START_OF_TURN", "END_OF_TURN", "SYSTEM", "USER", "CHATBOT"))
FORMS = {
    "llama-2": Form("legacy", "<s>", "</s>", "</s>", lead=" ", tail=" "),
    "llama-3": Form("bytes", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", LLAMA_3),
    "llama-3.2-vision": Form(
        "bytes",
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        (*LLAMA_3, "<|image|>"),
        image="<|image|>",
        options=(("date_string", "1 Jan 2026"),),
    ),
    "mistral-v0.3": Form("legacy", "<s>", "</s>", "</s>", ("[INST]", "[/INST]"), lead=" ", system=False),
    "vicuna": Form("legacy", "<s>", "</s>", "</s>", lead=" "),
    "qwen2.5": Form("bytes", None, "<|im_end|>", "<|im_end|>", ("<|endoftext|>", *CHATML)),
    "qwen2.5-base": Form("bytes", None, "<|endoftext|>", "<|im_end|>", CHATML),
    "qwen3": Form(
        "bytes",
        None,
        "<|im_end|>",
        "<|im_end|>",
        ("<|endoftext|>", *CHATML),
        lead="<think>\n\n</think>\n\n",
        thinks=True,
    ),
    "qwen3-no-thinking": Form(
        "bytes",
        None,
        "<|im_end|>",
        "<|im_end|>",
        ("<|endoftext|>", *CHATML),
        options=(("enable_thinking", False),),
        thinks=True,
    ),
    "gemma-3": Form(
        "spaces",
        "<bos>",
        "<eos>",
        "<end_of_turn>",
        ("<start_of_turn>", "<end_of_turn>", "<start_of_image>"),
        image="<start_of_image>",
    ),
    "phi-3": Form("legacy", "<s>", "<|endoftext|>", "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "glm-4": Form(
        "bytes",
        None,
        "<|endoftext|>",
        "<|user|>",
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
        last_end="<|user|>",
    ),
    "command-r": Form("bytes", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", COMMAND),
    "smolvlm": Form(
        "bytes",
        None,
        "<end_of_utterance>",
        "<end_of_utterance>",
        ("<|im_start|>", "<image>"),
        lead=" ",
        image="<image>",
    ),
    "alpaca": Form("legacy", "<s>", "</s>", "", last_end="</s>"),
    "deepseek": Form(
        "bytes",
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        ("<｜User｜>", "<｜Assistant｜>"),
    ),
    "zephyr": Form("legacy", "<s>", "</s>", "</s>"),
    "granite": Form("bytes", None, "<|end_of_text|>", "<|end_of_text|>", ("<|start_of_role|>", "<|end_of_role|>")),
}
FILES = {"qwen2.5-base": "qwen2.5", "qwen3-no-thinking": "qwen3"}
ANSWERS = ("A red dog.", "Red, I think.")
CHAT = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": ANSWERS[0]},
    {"role": "user", "content": "And its colour?"},
    {"role": "assistant", "content": ANSWERS[1]},
]
SYSTEM = {"role": "system", "content": "Be brief."}
WITHOUT_START = ("phi-3", "zephyr")  # their templates write no BOS token
every_form = pytest.mark.parametrize("name", FORMS)


def tokenizer_of(form: Form) -> transformers.PreTrainedTokenizerFast:
    """Return a trained tokenizer of a form's kind, with its special tokens."""
    trained = Tokenizer(models.BPE(byte_fallback=form.kind != "bytes", unk_token=None))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if form.kind == "bytes":
        trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trained.decoder = decoders.ByteLevel()
    else:
        steps = [normalizers.Prepend("▁")] if form.kind == "legacy" else []
        trained.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
        trained.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                *([decoders.Strip(" ", 1, 0)] if form.kind == "legacy" else []),
            ]
        )
        alphabet = [chr(code) for code in range(33, 127)] + ["▁", "\n"]
    specials = list(dict.fromkeys(filter(None, (form.bos, form.eos, *form.specials))))
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    trained.train_from_iterator(CORPUS, trainer)
    if form.thinks:
        trained.add_tokens([AddedToken(word, normalized=False) for word in ("<think>", "</think>")])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=trained, bos_token=form.bos, eos_token=form.eos)


@pytest.fixture(scope="module")
def models_of(tmp_path_factory: pytest.TempPathFactory, assemble: Callable[..., Any]) -> dict[str, Any]:
    """Return a model of each form, which answers with its chat template."""

    def model(name: str) -> Any:
        form, folder = FORMS[name], tmp_path_factory.mktemp("form")
        tokenizer = tokenizer_of(form)
        tokenizer.chat_template = (TEMPLATES / f"{FILES.get(name, name)}.jinja").read_text()
        tokenizer.save_pretrained(folder)
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        return assemble(str(folder), prompt={"chat": "own", "chat_options": dict(form.options)})

    return {name: model(name) for name in FORMS}


def stock(model: Any, name: str, messages: list[Any], *, prompt: bool = False) -> list[int]:
    """Return the ids of `transformers` for a conversation; ``prompt``: as it stands before the next answer."""
    return list(
        model.lm.tokenizer.apply_chat_template(
            messages_of(name, messages),
            tokenize=True,
            return_dict=True,
            add_generation_prompt=prompt,
            **dict(FORMS[name].options),
        )["input_ids"]
    )


def messages_of(name: str, messages: list[Any]) -> list[Any]:
    """Return messages as the form takes them: lists of parts where it takes nothing else."""
    if name != "smolvlm":
        return messages
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


@every_form
@pytest.mark.parametrize("system", [False, True], ids=["", "system"])
def test_a_training_example_has_the_ids_of_apply_chat_template(models_of, example_of, encoded, name, system):
    model, form = models_of[name], FORMS[name]
    chat = [SYSTEM, *CHAT] if system else CHAT
    if system and not form.system:  # the template drops the system turn without a word
        with pytest.raises(MLLMError, match=r"loses turn 1 \(system\)"):
            example_of(model, chat)
        return
    expected = stock(model, name, chat)
    if form.last_end is not None:  # nothing in the template's text ends the last turn, so the end is added
        expected.append(model.lm.tokenizer.convert_tokens_to_ids(form.last_end))
    assert encoded(model, example_of(model, chat)).ids == expected


@every_form
def test_the_targets_are_the_answers_and_their_ends(models_of, example_of, encoded, name):
    model, form = models_of[name], FORMS[name]
    tokenizer = model.lm.tokenizer
    row = encoded(model, example_of(model, CHAT))
    text = tokenizer.apply_chat_template(messages_of(name, CHAT), tokenize=False, **dict(form.options))
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    spans, place = [], 0
    for number, answer in enumerate(ANSWERS):
        lead = "" if form.thinks and number < len(ANSWERS) - 1 else form.lead  # a thought stands in the last turn only
        end = form.end if number < len(ANSWERS) - 1 or form.last_end is None else ""
        words = lead + answer + form.tail + end
        place = text.index(words, place)
        spans.append((place, place + len(words)))
        place += len(words)
    learned = [any(start < end and first < end and start < last for first, last in spans) for start, end in offsets]
    expected = [id_ if is_learned else -100 for id_, is_learned in zip(row.ids, learned, strict=False)]
    if form.last_end is not None:
        expected.append(tokenizer.convert_tokens_to_ids(form.last_end))
    if form.end == "":  # the end of a turn in the middle is learned in the place of the next turn's first token
        after = next(index for index, (start, _) in enumerate(offsets) if start >= spans[0][1])
        expected[after] = tokenizer.eos_token_id
    assert row.labels == expected


@every_form
@pytest.mark.parametrize("system", [False, True], ids=["", "system"])
def test_a_prompt_has_the_ids_of_apply_chat_template(models_of, prompt_of, name, system):
    model = models_of[name]
    chat = [SYSTEM, *CHAT[:-1]] if system else CHAT[:-1]
    assert model.encode(prompt_of(model, chat)).ids == stock(model, name, chat, prompt=True)


@every_form
def test_what_is_learned_follows_the_prompt(models_of, prompt_of, example_of, encoded, name):
    model = models_of[name]
    prompt = model.encode(prompt_of(model, CHAT[:-1])).ids
    row = encoded(model, example_of(model, CHAT))
    assert row.ids[: len(prompt)] == prompt
    assert row.labels[len(prompt) - 1] == -100
    assert row.labels[len(prompt)] == row.ids[len(prompt)]


@every_form
def test_an_image_keeps_its_place(models_of, prompt_of, name):
    model, form = models_of[name], FORMS[name]
    mark = form.image or "<|an image|>"
    content = [{"type": "image", "image": IMAGE}, {"type": "text", "text": "What is it?"}]
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model.lm.tokenizer.name_or_path)
    if form.image is None:
        tokenizer.add_tokens([AddedToken(mark, normalized=False, special=True)])
        turn: dict[str, Any] = {"role": "user", "content": f"{mark}What is it?"}
    else:
        turn = {"role": "user", "content": [{"type": "image"}, content[1]]}
    expected = tokenizer.apply_chat_template(
        [turn], tokenize=True, return_dict=True, add_generation_prompt=True, **dict(form.options)
    )["input_ids"]
    place = expected.index(tokenizer.convert_tokens_to_ids(mark))
    encoded = model.encode(prompt_of(model, [{"role": "user", "content": content}]))
    visual = [index for index, seen in enumerate(encoded.visual) if seen]
    assert visual == list(range(place, place + model.tokens_per_image))
    text = [id_ for id_, seen in zip(encoded.ids, encoded.visual, strict=True) if not seen]
    assert text == expected[:place] + expected[place + 1 :]


@every_form
def test_an_answer_stops_at_the_end_of_turn(models_of, prompt_of, scripted, name):
    model, form = models_of[name], FORMS[name]
    ids = model.lm.tokenizer.convert_tokens_to_ids
    end = ids(form.last_end or form.end)
    word = model.lm.tokenizer("dog", add_special_tokens=False).input_ids[-1]
    with scripted(model, word, end, word) as script:
        (answer,) = model.generate([prompt_of(model, CHAT[:-1])], max_new_tokens=8)
    assert script.tokens == 2
    assert str(answer) == model.lm.tokenizer.decode([word]).strip()


@pytest.mark.parametrize("name", ["llama-2", "mistral-v0.3", "gemma-3"])
def test_turns_that_a_form_refuses_are_one_message(models_of, prompt_of, name):
    with pytest.raises(MLLMError, match="take turns"):
        prompt_of(models_of[name], [CHAT[0], CHAT[2]])


@every_form
def test_control_words_of_a_user_are_text(models_of, prompt_of, name):
    model, form = models_of[name], FORMS[name]
    for word in dict.fromkeys(filter(None, (form.end, form.eos, form.bos))):
        control = model.lm.tokenizer.convert_tokens_to_ids(word)
        ids = model.encode(prompt_of(model, [{"role": "user", "content": f"What {word}is it?"}])).ids
        plain = model.encode(prompt_of(model, [{"role": "user", "content": "What is it?"}])).ids
        assert ids.count(control) == plain.count(control)


def content_of(text: str, *, before: bool = True) -> list[dict[str, Any]]:
    """Return a user's words, with an image before or after them."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": IMAGE}, {"type": "text", "text": text}]
    return parts if before else parts[::-1]


EXPORTED: dict[str, list[dict[str, Any]]] = {
    "an image first": [{"role": "user", "content": content_of("What is it?")}],
    "an image last": [{"role": "user", "content": content_of(" Look: ", before=False)}],
    "texts around an image": [
        {"role": "user", "content": [{"type": "text", "text": "This one"}, *content_of("or"), *content_of(" that?")]}
    ],
    "several turns": [
        {"role": "user", "content": content_of("What is it?")},
        CHAT[1],
        {"role": "user", "content": content_of("And this?", before=False)},
    ],
    "a system turn": [SYSTEM, {"role": "user", "content": content_of("What is it?")}],
    "texts": [SYSTEM, *CHAT[:-1]],
    "texts in parts": [{"role": "user", "content": [{"type": "text", "text": text} for text in (" What", " is it? ")]}],
}


@pytest.fixture(scope="module")
def export_of(
    models_of: dict[str, Any], encoder: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, bool], tuple[Any, Any]]:
    """Return a function of a form, and of whether its tokenizer puts BOS before every text, as published ones do.

    It returns a model, and the processor of the folder that the model is exported to.
    """

    @functools.cache
    def exported(name: str, starts: bool) -> tuple[Any, Any]:
        folder = tmp_path_factory.mktemp("exported")
        shutil.copytree(models_of[name].spec.lm.model, folder / "lm")
        if starts:
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder / "lm")
            bos = FORMS[name].bos or "[gMASK] <sop>"
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(word, tokenizer.get_vocab()[word]) for word in bos.split()]
            )
            tokenizer.save_pretrained(folder / "lm")
        prompt = {"chat": "own", "chat_options": dict(FORMS[name].options)}
        model = mllm.assemble({"model": encoder, "layer": -1}, str(folder / "lm"), "linear", prompt=prompt)
        export(model, folder / "out", to="hf-llava")
        return model, transformers.AutoProcessor.from_pretrained(folder / "out", backend="pil")

    return exported


def assert_exported_alike(model: Any, processor: Any, prompt: list[Any], messages: list[Any]) -> None:
    """Assert that an exported processor gives the ids of the model's prompt, and image tokens where it has images."""
    ids = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    encoded = model.encode(prompt)
    image = processor.image_token_id
    expected = [image if visual else id_ for id_, visual in zip(encoded.ids, encoded.visual, strict=True)]
    assert ids["input_ids"][0] == expected
    assert expected.count(image) == model.tokens_per_image * sum(
        part["type"] == "image"
        for message in messages
        if isinstance(message["content"], list)
        for part in message["content"]
    )


@every_form
@pytest.mark.parametrize("conversation", EXPORTED)
def test_an_exported_folder_has_the_ids_of_the_model(export_of, prompt_of, name, conversation):
    model, processor = export_of(name, False)
    messages = EXPORTED[conversation]
    if name == "llama-3.2-vision" and conversation == "a system turn":
        with pytest.raises(TemplateError, match="no system turn beside images"):
            processor.apply_chat_template(messages, tokenize=True)
        return
    assert_exported_alike(model, processor, prompt_of(model, messages), messages)


@pytest.mark.parametrize("conversation", ["an image first", "several turns", "texts"])
@pytest.mark.parametrize("name", [name for name in FORMS if FORMS[name].bos or name == "glm-4"])
def test_an_exported_folder_writes_one_start_token(export_of, prompt_of, name, conversation):
    if name in WITHOUT_START:
        with pytest.raises(MLLMError, match="does not begin with '<s>', which the tokenizer puts before every text"):
            export_of(name, True)
        return
    model, processor = export_of(name, True)
    assert_exported_alike(model, processor, prompt_of(model, EXPORTED[conversation]), EXPORTED[conversation])


def test_the_forms_are_at_least_twelve():
    assert len({FILES.get(name, name) for name in FORMS}) >= 12
    assert {path.stem for path in TEMPLATES.glob("*.jinja")} == {FILES.get(name, name) for name in FORMS}
