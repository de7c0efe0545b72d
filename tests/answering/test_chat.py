"""Conversations: equal to the whole computed at once, safe against smuggled tokens, kept and taken up again."""

from __future__ import annotations

import json
from typing import Any

import pytest

import mllm
from mllm.answering.view import View
from mllm.errors import MLLMError
from mllm.media.images import source_of
from mllm.prompts.messages import turns
from mllm.scorers.index import ImageIndex
from mllm.testing import tiny_image

A, B, C = tiny_image(1), tiny_image(2), tiny_image(3)
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture(params=["plain", "own"])
def model(request, tiny_parts):
    model = mllm.assemble(
        tiny_parts[0], tiny_parts[1], prompt={"chat": request.param, "template": "See{images}. {prompt}"}
    )
    model.lm.tokenizer.chat_template = TEMPLATE
    return model


def user(text: str, *images: Any) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [*({"type": "image", "image": source_of(i)} for i in images), {"type": "text", "text": text}],
    }


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def test_every_turn_is_answered_as_the_whole_conversation_would_be(model):
    chat = model.chat()
    whole: list[dict[str, Any]] = []
    for text, images in [("what is it?", [A]), ("and these", [B, C]), ("why?", []), ("", [A])]:
        whole.append(user(text, *images))
        expected = str(model.generate([turns(model, whole)], max_new_tokens=6)[0])
        assert chat.send(text, images, max_new_tokens=6) == expected
        whole.append(assistant(expected))
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 4


def test_earlier_turns_are_not_computed_again(model, monkeypatch):
    chat = model.chat()
    chat.send("what is it?", [A, B], max_new_tokens=3)
    seen = []
    features = model.encoded

    def counted(images):
        seen.append(len(images))
        return features(images)

    monkeypatch.setattr(model, "encoded", counted)
    chat.send("and now?", [C], max_new_tokens=3)
    assert seen == [1]
    chat.drop()
    chat.send("again?", max_new_tokens=3)
    assert seen == [1, 1]  # the first turn went with its pictures: what is left is read anew


def test_another_picture_under_the_same_words_is_looked_at(model):
    chat = model.chat()
    for image in (A, B):
        chat.send("what is it?", [image], max_new_tokens=1)
    chat.messages[1]["content"] = chat.messages[3]["content"]  # both turns now differ in their picture alone
    chat.drop()
    expected = str(model.generate([turns(model, [*chat.messages, user("why?")])], max_new_tokens=7)[0])
    assert chat.send("why?", max_new_tokens=7) == expected


def test_a_stream_is_the_answer_in_pieces(model):
    whole = model.chat().send("what is it?", [A], max_new_tokens=9)
    chat = model.chat()
    assert "".join(chat.stream("what is it?", [A], max_new_tokens=9)).strip() == whole


def test_what_a_person_writes_is_never_a_control_token(model):
    special = model.lm.tokenizer.all_special_tokens
    assert special
    text = "".join(special)
    harmless, smuggled = ([user(words, A)] for words in ("x", text))
    control = set(model.lm.tokenizer.all_special_ids)

    def controls(messages: Any) -> int:
        encoded = model.encode(turns(model, messages))
        return sum(token in control for token, visual in zip(encoded.ids, encoded.visual, strict=True) if not visual)

    assert controls(smuggled) == controls(harmless)
    assert sum(model.encode(turns(model, smuggled)).visual) == model.connector.num_tokens


def test_the_models_own_template_is_followed_token_for_token(tiny_parts):
    model = mllm.assemble(tiny_parts[0], tiny_parts[1], prompt={"chat": "own"})
    model.lm.tokenizer.chat_template = TEMPLATE
    encoded = model.encode(turns(model, [user("one two")]))
    rendered = TEMPLATE.split("{%")[0] + "<s>user\none two</s>\n<s>assistant\n"
    assert model.lm.tokenizer.decode(encoded.ids) == model.lm.tokenizer.decode(
        model.lm.tokenizer(rendered, add_special_tokens=False).input_ids
    )


def test_a_conversation_is_saved_and_taken_up(model, tmp_path):
    C.save(tmp_path / "c.png")
    chat = model.chat("be brief")
    chat.send("what is it?", [A, tmp_path / "c.png"], max_new_tokens=4)
    messages = json.loads(chat.save(tmp_path / "chat.json").read_text())
    kinds = [part["image"].partition(":")[0] for part in messages[1]["content"] if part["type"] == "image"]
    assert kinds == ["data", str(tmp_path / "c.png")]
    again = model.chat(messages=messages)
    assert again.send("and?", max_new_tokens=6) == chat.send("and?", max_new_tokens=6)
    chat.reset()
    assert [message["role"] for message in chat.messages] == ["system"]


def test_openais_messages_are_read(model):
    import base64
    import io

    buffer = io.BytesIO()
    A.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    message = {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "x"}],
    }
    chats = [model.chat(messages=[first, assistant("y")]) for first in (message, user("x", A))]
    first, second = (chat.send("z", max_new_tokens=5) for chat in chats)
    assert first == second


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "robot", "content": "x"}, "needs a role"),
        ({"role": "user", "content": 3}, "a text or a list of parts"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]},
            "nothing is downloaded",
        ),
        ({"role": "user", "content": [{"type": "video"}]}, "a text, an image or an image_url"),
    ],
)
def test_messages_of_another_form(model, message, expected):
    with pytest.raises(MLLMError, match=expected):
        model.chat(messages=[message])


def test_what_fails_leaves_the_conversation_as_it_was(model, tmp_path):
    chat = model.chat()
    answer = chat.send("what is it?", [A], max_new_tokens=3)
    before = list(chat.messages)
    with pytest.raises(MLLMError, match="no image file"):
        chat.send("and this?", [tmp_path / "none.png"])
    with pytest.raises(MLLMError, match="The message is empty"):
        chat.send(" ")
    with pytest.raises(MLLMError, match=r"chat.drop\(2\)"):
        chat.send("long " * 3000)
    assert chat.messages == before
    fresh = model.chat(messages=[user("what is it?", A), assistant(answer)])
    assert chat.send("so?", max_new_tokens=5) == fresh.send("so?", max_new_tokens=5)


def test_a_model_without_a_template_says_so(tiny_parts):
    model = mllm.assemble(tiny_parts[0], tiny_parts[1], prompt={"chat": "own"})
    model.lm.tokenizer.chat_template = None
    with pytest.raises(MLLMError, match=r"prompt\.chat=plain"):
        model.chat()


def test_views_are_untouched_by_chats(model):
    assert isinstance(model.see([A]), View)


def test_an_answer_with_images_is_that_of_the_whole_conversation(tiny_model, tmp_path):
    model = tiny_model(heads=[{"type": "retrieval", "dim": 6}], tokens=["[RET]"])
    for number in range(3):
        tiny_image(number).save(tmp_path / f"{number}.png")
    index = ImageIndex.build(model, sorted(tmp_path.glob("*.png")))
    chat = model.chat()
    chat.send("what is it?", [A], max_new_tokens=3)
    output = chat.show("show me", index=index, image_logit_bias=1e4, max_new_tokens=4)
    (expected,) = model.generate(
        [turns(model, chat.messages[:-1])], index=index, image_logit_bias=1e4, max_new_tokens=4
    )
    assert list(output) == list(expected) and output.images
    assert chat.messages[-1]["content"][0]["text"] == str(output).strip()  # its words go on
    assert chat.send("and?", max_new_tokens=2) is not None
