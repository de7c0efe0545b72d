"""Prompts that end close to the context's end: answered, or refused with one message, for every kind of positions."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from mllm.errors import MLLMError
from mllm.testing import tiny_image

IMAGE = tiny_image(1)
REASON = "Right with the parts that people bring: a context of learned positions that the new tokens would pass"
crashes = pytest.mark.xfail(strict=True, raises=IndexError, reason=REASON)
learned_positions = [pytest.param(family, marks=crashes) for family in ("gpt2", "opt", "gpt-neo")]
every_family = pytest.mark.parametrize("family", [*learned_positions, "llama"])


def long_text(model: Any, left: int = 10) -> str:
    """Return a text that leaves so many positions of the context, the image's included; a character is a token."""
    return "x" * (model.lm.context - left)


@every_family
def test_generate_past_the_context(model_of, family):
    model = model_of(family)
    with contextlib.suppress(MLLMError):
        assert len(model.generate([[IMAGE, long_text(model)]], max_new_tokens=20)) == 1


@every_family
def test_a_view_that_generates_past_the_context(model_of, family):
    model = model_of(family)
    with contextlib.suppress(MLLMError):
        assert isinstance(model.see([IMAGE, long_text(model)]).continue_with(" y", max_new_tokens=20), str)


@pytest.mark.parametrize(
    "family",
    [
        *learned_positions,
        pytest.param(
            "llama",
            marks=pytest.mark.xfail(
                strict=True,
                raises=pytest.fail.Exception,
                reason="Right with the parts that people bring: a view whose question passes the context is refused",
            ),
        ),
    ],
)
def test_a_view_whose_question_passes_the_context_is_refused(model_of, family):
    model = model_of(family)
    view = model.see([IMAGE, long_text(model)])
    with pytest.raises(MLLMError):
        view.continue_with("z" * 30, max_new_tokens=2)


@every_family
def test_a_candidate_past_the_context_is_scored_or_refused(model_of, family):
    model = model_of(family)
    with contextlib.suppress(MLLMError):
        assert len(model.score([IMAGE, long_text(model)], ["a" * 20, "b"])) == 2


@every_family
def test_a_chat_past_the_context(model_of, family):
    model = model_of(family)
    with contextlib.suppress(MLLMError):
        assert isinstance(model.chat().send(long_text(model, 60), [IMAGE], max_new_tokens=40), str)


@pytest.mark.xfail(strict=True, raises=AssertionError, reason=REASON)
def test_the_server_answers_or_refuses_a_request_past_the_context(model_of, serve):
    model = model_of("gpt2")
    status, body = serve(model).ask(long_text(model, 40), max_tokens=100)
    assert status in (200, 400), body


def test_the_server_answers_after_a_request_past_the_context(model_of, serve):
    model = model_of("gpt2")
    serve(model).ask(long_text(model, 40), max_tokens=100)
    assert serve(model).ask("hi")[0] == 200


@crashes
def test_returned_errors_keep_the_answers_of_the_other_prompts(model_of):
    model = model_of("gpt2")
    expected = str(model.generate([[IMAGE, "hi"]], max_new_tokens=20)[0])
    outputs = model.generate([[IMAGE, long_text(model)], [IMAGE, "hi"]], max_new_tokens=20, errors="return")
    assert str(outputs[1]) == expected
