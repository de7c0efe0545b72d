"""Decoding with penalties: the same for a prompt, a view and a chat, and whether the pad token is the EOS or not."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from mllm.testing import tiny_image

IMAGE = tiny_image(1)
TEXT = "the cat the cat"
PENALTY = 1.8
NEW_TOKENS = 24

every_family = pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])


@torch.no_grad()
def penalized(model: Any, prompt: tuple[int, ...]) -> str:
    """Return a greedy answer, token by token, whose repetitions are penalized as in CTRL (arXiv:1909.05858)."""
    embeds, _ = model.prepare([[IMAGE, TEXT]])
    ids: list[int] = []
    while len(ids) < NEW_TOKENS:
        answered = [model.lm.embed(torch.tensor([ids]))] if ids else []
        logits = model.lm.model(inputs_embeds=torch.cat([embeds, *answered], 1)).logits[0, -1].clone()
        for token in {*ids, *prompt}:
            logits[token] *= PENALTY if logits[token] < 0 else 1 / PENALTY
        token = int(logits.argmax())
        if token == model.lm.eos:
            break
        ids.append(token)
    return str(model.lm.decode(ids)).strip()


@every_family
def test_the_penalty_is_on_the_prompts_tokens_too(model_of, family):
    model = model_of(family)
    encoded = model.encode([IMAGE, TEXT])
    prompt = tuple(token for token, visual in zip(encoded.ids, encoded.visual, strict=True) if not visual)
    answer = str(model.generate([[IMAGE, TEXT]], max_new_tokens=NEW_TOKENS, repetition_penalty=PENALTY)[0])
    assert answer == penalized(model, prompt)


@every_family
@pytest.mark.parametrize(
    "decoding", [{"repetition_penalty": PENALTY}, {"no_repeat_ngram_size": 1}], ids=lambda options: next(iter(options))
)
def test_a_view_continues_as_generate_does(model_of, family, decoding):
    model = model_of(family)
    answer = str(model.generate([[IMAGE, TEXT]], max_new_tokens=NEW_TOKENS, **decoding)[0])
    assert model.see([IMAGE]).continue_with(TEXT, max_new_tokens=NEW_TOKENS, **decoding) == answer


@every_family
def test_an_answer_that_ends_at_once_ends_at_once_everywhere(model_of, family):
    model = model_of(family)
    decoding = {"max_new_tokens": 10, "repetition_penalty": 1.5}

    def eos_first(module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros_like(logits)
        logits[..., model.lm.eos], logits[..., 70] = 2.0, 1.5  # a penalty of 1.5 on EOS lets the other token win
        return logits

    handle = model.lm.model.get_output_embeddings().register_forward_hook(eos_first)
    try:
        chat = model.chat()
        answers = {
            "generate": str(model.generate([[IMAGE, "x"]], **decoding)[0]),
            "view": model.see([IMAGE]).continue_with("x", **decoding),
            "first turn": chat.send("x", [IMAGE], **decoding),
            "second turn": chat.send("y", **decoding),
        }
    finally:
        handle.remove()
    assert answers == dict.fromkeys(answers, "")


RECIPES: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3, "max_new_tokens": 8},
    "penalties": {"repetition_penalty": 0.3, "max_new_tokens": 8},
    "nearest words": {"nearest_words": {"top": 3}, "max_new_tokens": 8},
    "candidates": {"candidates": 3, "seed": 5, "temperature": 2.0, "max_new_tokens": 8},
}


@pytest.mark.parametrize("decoding", RECIPES.values(), ids=RECIPES.keys())
def test_a_recipes_decoding_is_that_of_the_server_and_of_a_chat(
    assemble, lm_folder, prompt_of, serve, data_url, tiny_clip, decoding
):
    options: dict[str, Any] = {"scorer": {"type": "dual-encoder", "model": tiny_clip}} if "seed" in decoding else {}
    model = assemble(lm_folder("llama"), decoding=decoding, **options)
    content = [{"type": "image", "image": IMAGE}, {"type": "text", "text": TEXT}]
    prompt = prompt_of(model, [{"role": "user", "content": content}])
    plain = str(model.generate([prompt], num_beams=1, candidates=1, nearest_words=None, repetition_penalty=None)[0])
    expected = str(model.generate([prompt])[0])
    assert model.chat().send(TEXT, [IMAGE]) == expected
    assert "".join(model.chat().stream(TEXT, [IMAGE])).rstrip() == expected
    parts = [{"type": "image_url", "image_url": {"url": data_url(IMAGE)}}, {"type": "text", "text": TEXT}]
    status, body = serve(model).post({"messages": [{"role": "user", "content": parts}]})
    assert (status, json.loads(body)["choices"][0]["message"]["content"]) == (200, expected)
    assert json.loads(body)["usage"]["completion_tokens"] == 8
    status, body = serve(model).post({"messages": [{"role": "user", "content": parts}], "stream": True})
    events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == expected
    assert "candidates" in decoding or plain != expected
