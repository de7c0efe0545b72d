"""Prompts that end close to the context's end: answered, or refused with one message, for every kind of positions."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from mllm.errors import MLLMError
from mllm.testing import tiny_image

IMAGE = tiny_image(1)
every_family = pytest.mark.parametrize("family", ["gpt2", "opt", "gpt-neo", "llama"])


def long_text(model: Any, left: int = 10) -> str:
    """Return a text that leaves so many tokens of the context after itself, BOS and an image; a character is one."""
    return "x" * (model.lm.context - left - 4 - len(model.lm.bos))


@pytest.fixture
def nothing_computed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Return a function that lets a model's encoder and language model fail from now on."""

    def forbid(model: Any) -> None:
        for part in (model.encoder, model.lm.model):
            monkeypatch.setattr(part, "forward", lambda *_, **__: pytest.fail("it was computed"))

    return forbid


@every_family
def test_an_answer_that_was_asked_for_and_does_not_fit_is_refused_before_anything_is_computed(
    model_of, family, nothing_computed
):
    model = model_of(family)
    text = long_text(model)
    view, chat = model.see([IMAGE, text]), model.chat()
    nothing_computed(model)
    for ask in (
        lambda: model.generate([["a"], [IMAGE, text]], max_new_tokens=11),
        lambda: view.continue_with(" y", max_new_tokens=10),
        lambda: view.continue_with("z" * 30, max_new_tokens=2),
        lambda: view.views.continue_with([["", "y" * 9]], max_new_tokens=2),
        lambda: view.score(["b", "a" * 9]),
        lambda: chat.send(long_text(model, 60), [IMAGE], max_new_tokens=60),
    ):
        with pytest.raises(MLLMError, match=rf"context is {model.lm.context} tokens|context .* {model.lm.context}"):
            ask()
    with pytest.raises(MLLMError, match=r"Prompt 1: .*of which 10 remain. Set max_new_tokens to 10 at most"):
        model.generate([["a"], [IMAGE, text]], max_new_tokens=11)
    with pytest.raises(MLLMError, match=r"Text 1 .*y'"):
        view.views.continue_with([["", "y" * 9]], max_new_tokens=2)
    with pytest.raises(MLLMError, match="candidate 'aaaaaaaaa'"):
        view.score(["b", "a" * 9])


@every_family
def test_an_answer_may_fill_the_context(model_of, scripted, family):
    model = model_of(family)
    text = long_text(model)
    with scripted(model, *model.lm.tokenize("a")):
        (output,) = model.generate([[IMAGE, text]], max_new_tokens=10)
        assert (str(output), output.finish_reason, output.num_tokens) == ("a" * 10, "length", 10)
        assert model.see([IMAGE, text[:-3]]).continue_with(text[-3:], max_new_tokens=10) == "a" * 10
    assert len(model.score([IMAGE, text], ["a" * 8])) == 1


@every_family
def test_the_recipes_length_is_a_default_and_limited_to_what_fits(model_of, scripted, family):
    model = model_of(family)
    assert model.spec.decoding["max_new_tokens"] == 20
    with scripted(model, *model.lm.tokenize("a")):
        short, whole = model.generate([[IMAGE, long_text(model)], ["a"]])
        assert (str(short), short.finish_reason) == ("a" * 10, "length")
        assert (str(whole), whole.finish_reason) == ("a" * 20, "length")
        assert model.see([IMAGE]).continue_with(long_text(model)) == "a" * 10
        (filled,) = model.generate([[IMAGE, long_text(model, 30)]], max_new_tokens=None)
        assert str(filled) == "a" * 30
    with scripted(model, *model.lm.tokenize("a"), model.lm.eos):
        (ended,) = model.generate([[IMAGE, long_text(model)]])
    assert (str(ended), ended.finish_reason, ended.num_tokens) == ("a", "stop", 1)


@every_family
def test_rows_of_a_batch_that_is_wider_than_the_context_are_answered_as_alone(model_of, family):
    """Padding and the rows that have ended take no positions from the others."""
    model = model_of(family)
    prompts: list[list[Any]] = [[IMAGE, long_text(model)], ["a"], [IMAGE, "hi"]]
    alone = [str(model.generate([prompt])[0]) for prompt in prompts]
    assert [str(output) for output in model.generate(prompts)] == alone
    views = model.see_each([prompt[:1] for prompt in prompts])
    assert views.continue_with([prompt[1:] or [""] for prompt in prompts]) == [[answer] for answer in alone]
    seen = model.see_each(prompts)
    assert seen[2].score(["b" * 12]) == pytest.approx(model.score(prompts[2], ["b" * 12]), abs=1e-3)
    assert seen.continue_with([[" y"], [" " + "z" * 40], []])[1] == [str(model.generate([["a " + "z" * 40]])[0])]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_server_refuses_a_request_past_the_context_and_answers_the_next(model_of, serve, scripted, family):
    model = model_of(family)
    text = long_text(model, 44)  # and the words of the prompt's template
    status, body = serve(model).ask(text, max_tokens=100)
    assert (status, json.loads(body)["error"]["code"]) == (400, "invalid_request")
    assert "max_new_tokens" in body
    assert serve(model).ask("hi")[0] == 200
    with scripted(model, *model.lm.tokenize("a")):
        status, body = serve(model).post({"messages": [{"role": "user", "content": text}]})
    (choice,) = json.loads(body)["choices"]
    assert (status, choice["finish_reason"]) == (200, "length")
    assert set(choice["message"]["content"]) == {"a"}


@pytest.mark.parametrize("temperature", [-1.0, 1e300])  # near 0 it is greedy
def test_the_server_refuses_a_value_that_cannot_be_right(model_of, serve, temperature):
    status, body = serve(model_of()).ask("hi", temperature=temperature)
    assert (status, "temperature" in body) == (400, True), body


def test_returned_errors_keep_the_answers_of_the_other_prompts(model_of):
    model = model_of("gpt2")
    expected = str(model.generate([[IMAGE, "hi"]], max_new_tokens=20)[0])
    outputs = model.generate([[IMAGE, long_text(model)], [IMAGE, "hi"]], max_new_tokens=20, errors="return")
    assert isinstance(outputs[0], MLLMError)
    assert str(outputs[1]) == expected
