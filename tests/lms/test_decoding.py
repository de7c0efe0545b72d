"""Decoding: tokens drawn, limited and stopped row by row; the contrast with the blind pass; views in batches."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

import mllm
from mllm.answering.contrastive import Contrastive
from mllm.answering.decode import answer, make_decoding
from mllm.encoders.dual_encoder import DualEncoder
from mllm.errors import MLLMError
from mllm.lms.decoding import Decoding, check_batch
from mllm.lms.sampling import Sampler
from mllm.testing import tiny_image

A, B, C = tiny_image(1), tiny_image(2), tiny_image(3, size=(20, 50))
PROMPTS = [["A picture of", A], [A, "cat.", B, "and another"], ["only text"], [C, "x"]]


@pytest.fixture
def model(tiny_parts):
    return mllm.assemble(tiny_parts[0], tiny_parts[1], {"type": "linear", "tokens": 4})


def test_a_seed_gives_the_same_answer_in_any_company(model):
    options = {"max_new_tokens": 12, "temperature": 1.5, "top_p": 0.95, "seed": 7}
    together = [str(output) for output in model.generate(PROMPTS, **options)]
    assert together == [str(model.generate([prompt], **options)[0]) for prompt in PROMPTS]
    assert together != [str(output) for output in model.generate(PROMPTS, **options | {"seed": 8})]
    assert together != [str(output) for output in model.generate(PROMPTS, max_new_tokens=12)]


def test_tokens_are_drawn_as_likely_as_their_scores_say():
    scores = torch.tensor([[1.0, 0.0, 2.0, -1.0]])
    sampler = Sampler([Decoding(warpers={"temperature": 2.0, "top_k": 3}, seed=0)])
    drawn = Counter(int(sampler(torch.zeros(1, 0), scores).argmax()) for _ in range(20_000))
    expected = torch.tensor([1.0, 0.0, 2.0, -math.inf]).div(2).softmax(-1)
    for token, share in enumerate(expected.tolist()):
        assert drawn[token] / 20_000 == pytest.approx(share, abs=0.015)  # four standard deviations


def test_temperature_zero_is_greedy(model):
    greedy = [str(output) for output in model.generate(PROMPTS, max_new_tokens=9)]
    assert [str(output) for output in model.generate(PROMPTS, max_new_tokens=9, temperature=0, seed=3)] == greedy


def test_rows_of_a_batch_end_each_by_their_own_settings(model):
    whole = str(model.generate([PROMPTS[0]], max_new_tokens=20)[0])
    stop = next(letter for letter in whole if letter.isascii())
    options: list[dict[str, Any]] = [
        {"max_new_tokens": 3},
        {"max_new_tokens": 20, "stop_strings": [stop]},
        {"max_new_tokens": 20},
    ]
    prompts: Any = [PROMPTS[0]] * 3
    short, stopped, long = map(str, answer(model, prompts, [make_decoding(model, one) for one in options]))
    assert long == whole and whole.startswith(short) and len(short) < len(whole)
    assert stopped == whole[: whole.index(stop) + len(stop)]


def test_only_what_is_decoded_row_by_row_may_differ_within_a_batch(model):
    one = Decoding(max_new_tokens=3, seed=1, warpers={"top_k": 5})
    check_batch([one, replace(one, max_new_tokens=9, seed=None, warpers={}, stop_strings="x")])
    for other in (
        replace(one, generation={"repetition_penalty": 1.5}),
        replace(one, parts={"contrastive": {"alpha": 1.0}}),
        replace(one, processors=(print,)),
    ):
        with pytest.raises(MLLMError, match=r"may differ in max_new_tokens, .*top_p.* only"):
            check_batch([one, other])
    beams = Decoding(max_new_tokens=3, generation={"num_beams": 2})
    check_batch([beams, beams])
    check_batch([beams, replace(beams, max_new_tokens=4, stop_strings=".")])
    with pytest.raises(MLLMError, match="samples all prompts of a batch alike"):
        check_batch([beams, replace(beams, do_sample=True)])


def test_a_decoding_is_the_recipes_with_the_callers_over_it(tiny_parts):
    recipe = {"max_new_tokens": 7, "top_p": 0.9, "repetition_penalty": 1.2, "contrastive": {"beta": 0.2}}
    decoding = make_decoding(mllm.assemble(*tiny_parts, decoding=recipe), {"max_new_tokens": 3, "top_p": None})
    assert decoding == Decoding(
        max_new_tokens=3, generation={"repetition_penalty": 1.2}, parts={"contrastive": {"beta": 0.2}}
    )
    assert not decoding.samples and replace(decoding, seed=0).samples


def test_beams_are_those_of_transformers(model):
    found = [str(output) for output in model.generate(PROMPTS, max_new_tokens=6, num_beams=3, length_penalty=2.0)]
    embeds, batch = model.prepare(PROMPTS)
    ids = model.lm.model.generate(
        inputs_embeds=embeds, attention_mask=batch.mask, max_new_tokens=6, num_beams=3, length_penalty=2.0,
        do_sample=False, eos_token_id=model.lm.eos, pad_token_id=model.lm.pad,
    )  # fmt: skip
    assert found == [model.lm.decode(row).strip() for row in ids.tolist()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_token": 3}, "max_new_tokens"),
        ({"num_beams": 2, "seed": 1}, "without beams"),
        ({"top_p": 3.0}, "top_p"),
        ({"contrastive": {"gamma": 1}}, "gamma"),
    ],
)
def test_settings_that_do_not_fit_are_refused(model, options, message):
    with pytest.raises(MLLMError, match=message):
        model.generate([["x", A]], **options)


def test_the_contrast_is_the_papers_equation(model):
    prompts = [["see", A, "what"], [B, "and", A, "is it"]]
    contrast = Contrastive(model, prompts, alpha=0.5, beta=0.1)
    embeds, batch = model.prepare(prompts)
    blind, blind_batch = model.prepare([["see", "what"], ["and", "is it"]])
    new = torch.tensor([[5, 9], [40, 41]])
    for length in range(3):  # each step feeds the chosen tokens to both passes
        more = model.lm.embed(new[:, :length])
        with torch.no_grad():
            both = [
                model.lm.logits(torch.cat([e, more], 1), torch.cat([b.mask, torch.ones(2, length).long()], 1))[:, -1]
                for e, b in ((embeds, batch), (blind, blind_batch))
            ]
        expected = 1.5 * both[0] - 0.5 * both[1]
        cut = both[0].softmax(-1) < 0.1 * both[0].softmax(-1).amax(-1, keepdim=True)
        found = contrast(new[:, :length], both[0])
        torch.testing.assert_close(found, expected.masked_fill(cut, -math.inf), atol=1e-4, rtol=1e-4)


def test_contrast_holds_in_batches_and_views(model):
    options = {"max_new_tokens": 9, "contrastive": {"alpha": 2.0, "beta": 0.0}}
    together = [str(output) for output in model.generate(PROMPTS, **options)]
    assert together == [str(model.generate([prompt], **options)[0]) for prompt in PROMPTS]
    assert together != [str(output) for output in model.generate(PROMPTS, max_new_tokens=9)]
    assert model.see([C]).continue_with("x", **options) == together[3]


def test_calibration_takes_the_blind_score_off(model):
    names = ["yes", "no", "maybe"]
    seen, blind = model.score([A, "is it?"], names), model.score(["is it?"], names)
    expected = [a - 0.5 * b for a, b in zip(seen, blind, strict=True)]
    assert model.score([A, "is it?"], names, calibrate=0.5) == pytest.approx(expected)


def test_one_bad_prompt_costs_the_others_nothing(model):
    prompts = [PROMPTS[0], ["x", b"no picture"], PROMPTS[3], [], ["x" * 300]]
    answers = model.generate(prompts, errors="return", max_new_tokens=5)
    assert [isinstance(answer, MLLMError) for answer in answers] == [False, True, False, True, True]
    assert str(answers[2]) == str(model.generate([PROMPTS[3]], max_new_tokens=5)[0])
    with pytest.raises(MLLMError, match="Prompt 1: "):
        model.generate(prompts)


def test_several_pictures_are_seen_and_asked_in_one_batch(model):
    prompts: list[list[Any]] = [[A], ["first", B, "then", C, "and"], ["words alone"]]
    texts = [["what?", "why is it so?"], [""], ["x", " y", "what?"]]
    views = model.see_each(prompts)
    found = views.continue_with(texts, max_new_tokens=9)
    for prompt, own, answers in zip(prompts, texts, found, strict=True):
        assert answers == [str(model.generate([[*prompt, text]], max_new_tokens=9)[0]) for text in own]
    assert views[0].ask("who?", max_new_tokens=5) == views.ask([["who?"], [], []], max_new_tokens=5)[0][0]
    assert [view.row for view in views] == [0, 1, 2] and views[1:][0].row == 1
    for row, prompt in enumerate(prompts):  # padding does not show in scores
        assert views[row].score(["a", "bc"]) == pytest.approx(model.score(prompt, ["a", "bc"]), abs=1e-3)
    with pytest.raises(MLLMError, match="each of the 3 views"):
        views.continue_with([["x"]])


def test_examples_are_seen_once_and_queries_behind_them(model):
    shots = model.see([A, "a cat.", B, "a dog"])
    queries: list[list[Any]] = [[C], [".", C, "which"], ["words"]]
    for query in queries:
        whole = [A, "a cat.", B, "a dog", *query]
        assert shots.see(query).continue_with(" is", max_new_tokens=8) == str(
            model.generate([[*whole, " is"]], max_new_tokens=8)[0]
        )
        assert shots.see(query).score(["x"]) == pytest.approx(model.score(whole, ["x"]), abs=1e-3)


def test_a_token_that_the_question_changes_is_read_anew(model, monkeypatch):
    def pairs(text, **options):  # a tokenizer that joins two letters wherever it can
        return [sum(text[i : i + 2].encode()) % 250 for i in range(0, len(text), 2)]

    monkeypatch.setattr(model.lm, "tokenize", pairs)
    views = model.see_each([[A, "odd"], [B, "even"], [C, "q"]])
    texts = [["what", "", "s"], ["what", "a"], ["", "pq"]]
    found = views.continue_with(texts, max_new_tokens=8)
    for prompt, own, answers in zip(views.prompts, texts, found, strict=True):
        assert answers == [str(model.generate([[*prompt, text]], max_new_tokens=8)[0]) for text in own]


def test_a_scorer_gives_the_similarities_of_its_model(tiny_clip):
    found = DualEncoder(model=tiny_clip).image_text([A, B, C], ["a cat", "two dogs and a bus"])
    clip, processor = CLIPModel.from_pretrained(tiny_clip), CLIPProcessor.from_pretrained(tiny_clip, backend="pil")
    inputs = processor(images=[A, B, C], text=["a cat", "two dogs and a bus"], return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = clip(**inputs).logits_per_image / clip.logit_scale.exp()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_candidate_closest_to_the_picture_is_kept(tiny_parts, tiny_clip):
    scorer = {"type": "dual-encoder", "model": tiny_clip}
    model = mllm.assemble(tiny_parts[0], tiny_parts[1], {"type": "linear", "tokens": 4}, scorer=scorer)
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 2.0}
    prompts: list[list[Any]] = [[A, "x"], [C, "it is"]]
    for prompt in prompts:
        texts = [str(model.generate([prompt], max_new_tokens=6, seed=seed, temperature=2.0)[0]) for seed in (5, 6, 7)]
        best = texts[int(model.scorer.image_text([prompt[0]], texts)[0].argmax())]
        assert str(model.generate([prompt], candidates=3, seed=5, **options)[0]) == best
        assert model.see(prompt[:1]).continue_with(prompt[1], candidates=3, seed=5, **options) == best
    with pytest.raises(MLLMError, match="has none"):
        model.generate([["words"]], candidates=2)
    with pytest.raises(MLLMError, match="has no scorer"):
        mllm.assemble(tiny_parts[0], tiny_parts[1]).generate([[A, "x"]], candidates=2)
