"""Solved examples before every prompt: the same tokens, answers and losses as if they were written out."""

from __future__ import annotations

from typing import Any

import pytest

import mllm
from mllm.answering.generate import answer_each
from mllm.config.data import DataSpec
from mllm.config.messages import checked
from mllm.config.prompt import PromptSpec
from mllm.data.items import Item, pieces_of
from mllm.errors import MLLMError
from mllm.media.images import source_of
from mllm.prompts.formatting import formatted
from mllm.prompts.messages import checked_messages, message, text_part, turns
from mllm.prompts.pieces import Target
from mllm.testing import tiny_image

IMAGE = tiny_image(1)
EXAMPLES = [
    {"words": "apple . . .", "answer": "an apple"},
    {"words": "two dogs . .", "question": "How many?", "answer": "two"},
]
PROMPT = {"template": "A photo of{images}.\n{prompt}", "caption": "A picture of", "question": "Q: {question} A:"}
WRITTEN = "A photo of apple . . ..\nA picture of an apple\nA photo of two dogs . ..\nQ: How many? A: two\n"


def assembled(parts: tuple[str, str], prompt: dict[str, Any]) -> Any:
    return mllm.assemble(parts[0], parts[1], {"type": "linear", "tokens": 4}, prompt=prompt)


@pytest.fixture(scope="module")
def models(tiny_parts: tuple[str, str]) -> tuple[Any, Any]:
    """A model with the examples in its recipe, and the same one without."""

    return assembled(tiny_parts, {**PROMPT, "examples": EXAMPLES}), assembled(tiny_parts, PROMPT)


def test_an_answer_is_that_of_the_examples_written_out(models):
    model, bare = models
    written = bare.generate([[WRITTEN + "A photo of", IMAGE, ".\nA picture of"]], max_new_tokens=6)
    (answer,) = answer_each(model, [IMAGE], "A picture of", max_new_tokens=6)
    assert str(answer) == str(written[0])
    assert model.see([IMAGE]).caption(max_new_tokens=6) == str(written[0])
    asked = bare.generate([[WRITTEN + "A photo of", IMAGE, ".\nQ: Which? A:"]], max_new_tokens=6)
    assert model.see([IMAGE]).ask("Which?", max_new_tokens=6) == str(asked[0])


def test_a_training_example_has_the_ids_and_targets_of_the_examples_written_out(models):
    model, bare = models
    item = Item("1", (source_of(IMAGE),), ("a cat",))
    ours = model.encode(pieces_of(item, model.spec.prompt, "a cat"))
    written = bare.encode([WRITTEN + "A photo of", IMAGE, ".\nA picture of", Target(" a cat")])
    assert (ours.ids, ours.labels, ours.visual) == (written.ids, written.labels, written.visual)


def test_an_example_with_an_image_stands_there_as_its_tokens(models, tiny_parts, tmp_path):
    tiny_image(2).save(tmp_path / "dog.png")
    examples = [{"image": str(tmp_path / "dog.png"), "answer": "a dog"}]
    model = assembled(tiny_parts, {**PROMPT, "examples": examples})
    written = ["A photo of", tiny_image(2), ".\nA picture of a dog\nA photo of", IMAGE, ".\nA picture of"]
    ours = formatted(model.spec.prompt, [IMAGE], "A picture of")
    assert model.encode(ours).visual.count(True) == 8
    assert model.score(ours, ["a cat", "a dog"]) == model.score(written, ["a cat", "a dog"])


def test_shots_follow_the_recipes_examples(models):
    item = Item("1", (source_of(IMAGE),), ("a cat",), shots=(Item("2", (), ("a bird",)),))
    pieces = pieces_of(item, models[0].spec.prompt)
    assert "".join(piece for piece in pieces if isinstance(piece, str)).startswith(
        WRITTEN + "A photo of.\nA picture of a bird\nA photo of"
    )


@pytest.mark.parametrize("example", [{"answer": "x"}, {"answer": "x", "words": "y", "image": "z.png"}])
def test_an_example_has_an_image_or_words(example):
    with pytest.raises(MLLMError, match="an example has an image, or words in its place: give one of the two"):
        checked(PromptSpec, {"examples": [example]})


SYSTEM = "A chat between a curious user and an assistant. "
VICUNA = {"turn": "USER: {images}\n{question} ASSISTANT:", "system": SYSTEM}
YI = {"turn": "### Human: {images}\n{question}\n### Assistant:", "system": "This is a chat.\n\n"}


def conversation(*turns: Any) -> list[dict[str, Any]]:
    """Return messages of the user and the assistant in turn; a turn is a text, or an image and a text."""
    parts = [
        [{"type": "image", "image": t[0]}, text_part(t[1])] if isinstance(t, tuple) else [text_part(t)] for t in turns
    ]
    return [message(("user", "assistant")[number % 2], content) for number, content in enumerate(parts)]


@pytest.mark.parametrize(
    ("prompt", "written"),
    [
        (VICUNA, [SYSTEM + "USER: ", IMAGE, "\nWhat? ASSISTANT: a cat\nUSER: Why? ASSISTANT:"]),
        (
            YI,
            ["This is a chat.\n\n### Human: ", IMAGE, "\nWhat?\n### Assistant: a cat\n### Human: Why?\n### Assistant:"],
        ),
    ],
)
def test_a_turn_has_its_image_inside_and_stands_after_the_system_prompt(tiny_parts, prompt, written):
    model, bare = assembled(tiny_parts, prompt), assembled(tiny_parts, PROMPT)
    messages = checked_messages(conversation((IMAGE, "What?"), "a cat", "Why?"))
    ours, wanted = model.encode(turns(model, messages)), bare.encode(written)
    assert (ours.ids, ours.visual) == (wanted.ids, wanted.visual)
    alone = model.encode(formatted(model.spec.prompt, [IMAGE], model.spec.prompt.question.format(question="What?")))
    first = bare.encode([*written[:2], written[2].partition(" a cat")[0]])
    assert (alone.ids, alone.visual) == (first.ids, first.visual)
    item = Item("1", (source_of(IMAGE),), ("a cat",), question="What?")
    learned = model.encode(pieces_of(item, model.spec.prompt, "a cat"))
    assert learned.ids[: len(first.ids)] == first.ids
    assert model.see([IMAGE]).ask("What?", max_new_tokens=4) == str(
        bare.generate([[*written[:2], written[2].partition(" a cat")[0]]], max_new_tokens=4)[0]
    )


def test_a_conversations_own_system_message_stands_in_place_of_the_recipes(tiny_parts):
    model = assembled(tiny_parts, VICUNA)
    messages = [message("system", [text_part("Be brief.")]), *conversation("Why?")]
    text = "".join(turns(model, checked_messages(messages)))
    assert text == "Be brief.\nUSER: Why? ASSISTANT:"


def test_a_source_may_leave_the_turn_out():
    own = DataSpec(format="x", prompt={"caption": "", "template": "{images}{prompt}"})
    prompt = own.prompt_over(PromptSpec.model_validate(VICUNA))
    assert (prompt.template, prompt.caption, prompt.turn, prompt.system) == ("{images}{prompt}", "", "", SYSTEM)
    turned = DataSpec(format="x", prompt={"turn": YI["turn"]}).prompt_over(PromptSpec.model_validate(PROMPT))
    assert (turned.template, turned.question) == ("### Human: {images}\n{prompt}", "{question}\n### Assistant:")
    assert PromptSpec.model_validate_json(turned.model_dump_json()) == turned


@pytest.mark.parametrize(
    "words",
    [
        {"turn": "USER: {question}"},
        {"turn": "{question} {images}"},
        {"turn": "{images} {question} {answer}"},
        {"turn": "{images}{question}", "template": "a {images}{prompt}"},
        {"turn": "{images}{question}", "question": "Q: {question}"},
    ],
)
def test_a_turn_has_both_slots_and_stands_alone(words):
    with pytest.raises(MLLMError, match="turn"):
        checked(PromptSpec, words)
