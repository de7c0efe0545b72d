"""The assembled model: batch = single, frozen parts as they were, interleaving, views and scores."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mllm
import mllm.objectives.caption
import mllm.prompts.pieces
from mllm.errors import MLLMError
from mllm.hub.fingerprints import tensor_hash
from mllm.prompts.batch import collate
from mllm.testing import ENCODER_FAMILIES, tiny_image
from mllm.training.calibration import calibrate

A, B, C = tiny_image(1), tiny_image(2), tiny_image(3, size=(20, 50))
PROMPTS = [
    ["A picture of", A],
    [A, "cat.", B, "and another"],
    ["only text in this one"],
    [C],
    [A, B, C, "x"],
]


@pytest.fixture(params=[{"type": "linear"}, {"type": "linear", "tokens": 4}, {"type": "linear", "norm": True}])
def model(request, tiny_parts):
    return mllm.assemble(tiny_parts[0], tiny_parts[1], request.param)


def test_a_batch_gives_what_its_members_give_alone(model):
    together = [str(output) for output in model.generate(PROMPTS, max_new_tokens=12)]
    alone = [str(model.generate([prompt], max_new_tokens=12)[0]) for prompt in PROMPTS]
    assert together == alone
    assert len(set(together)) == len(PROMPTS)  # the prompts tell, so equality is no accident


def test_logits_of_a_padded_batch_equal_those_of_its_members(model):
    embeds, batch = model.prepare(PROMPTS)
    logits = model.lm.logits(embeds, batch.mask)
    for row, prompt in enumerate(PROMPTS):
        single, one = model.prepare([prompt])
        length = one.ids.shape[1]
        torch.testing.assert_close(logits[row, -length:], model.lm.logits(single, one.mask)[0], atol=2e-5, rtol=1e-4)


def test_without_an_image_the_logits_are_the_bare_language_models(tiny_parts, model):
    bare = AutoModelForCausalLM.from_pretrained(tiny_parts[1])
    ids = AutoTokenizer.from_pretrained(tiny_parts[1])("no picture here", return_tensors="pt").input_ids
    _, batch = model.prepare([["no picture", " here"]])
    assert batch.ids.tolist() == ids.tolist()
    with torch.no_grad():
        assert torch.equal(model.logits(None, batch), bare(input_ids=ids).logits)


def test_text_without_images_generates_as_the_bare_language_model(tiny_parts, model):
    bare: Any = AutoModelForCausalLM.from_pretrained(tiny_parts[1])
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_parts[1])
    inputs = tokenizer("no picture here", return_tensors="pt", return_token_type_ids=False)
    expected = bare.generate(**inputs, max_new_tokens=10, do_sample=False)[0, inputs.input_ids.shape[1] :]
    text = tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert str(model.generate([["no picture here"]], max_new_tokens=10)[0]) == text


def test_an_image_changes_the_answer_and_stands_where_it_was_put(model):
    answers = {str(model.generate([prompt], max_new_tokens=12)[0]) for prompt in ([A, "x"], [B, "x"], ["x", A], ["x"])}
    assert len(answers) == 4


def test_embeddings_hold_text_and_visual_tokens_at_their_places(model):
    embeds, batch = model.prepare([["ab", A, "c"]])
    tokens = model.connector(model.features([A]))
    count = model.connector.num_tokens
    text = model.lm.embed(torch.tensor([model.lm.tokenize("abc")]))
    assert torch.equal(embeds[0, :2], text[0, :2])
    assert torch.allclose(embeds[0, 2 : 2 + count], tokens[0])
    assert torch.equal(embeds[0, 2 + count :], text[0, 2:])
    assert batch.visual[0].sum() == count


def test_only_the_connector_gets_a_gradient(model):
    model.requires_grad_(False).connector.requires_grad_(True)
    rows = [[A, "x", mllm.prompts.pieces.Target(" y")]]
    batch = collate([model.encode(row) for row in rows], model.lm.pad)
    objective = mllm.objectives.caption.Caption()
    (loss,) = model.train()(rows, model.features([A]), batch, [objective])
    (loss / objective.count(rows, batch)).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("connector."), name
    assert all(p.grad.abs().sum() > 0 for p in model.connector.parameters())


def test_training_mode_leaves_the_frozen_parts_in_evaluation_mode(model):
    model.train()
    assert model.connector.training and not model.encoder.training and not model.lm.training


def test_a_picture_in_training_is_seen_as_it_is_alone(tiny_parts, tmp_path):
    model = mllm.assemble(ENCODER_FAMILIES["resnet"](tmp_path), tiny_parts[1], "linear")
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in model.encoder.modules())
    model.spec.trained = ["encoder"]
    pixels, before = model.encoder.preprocess([A, B, C]), tensor_hash(model.encoder)
    assert model.train().encoder.training
    together = model.encoder(pixels)
    alone = torch.cat([model.encoder(pixels[index : index + 1]) for index in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert tensor_hash(model.encoder) == before  # nor does a pass change statistics


def test_generating_changes_no_tensor(model):
    before = tensor_hash(model)
    model.generate(PROMPTS, max_new_tokens=3)
    model.see([A]).score(["x", "yz"])
    assert tensor_hash(model) == before


def test_a_view_answers_as_the_whole_prompt_does(model):
    view = model.see([A, "first", B])
    for text in ("what?", "another question", ""):
        whole = str(model.generate([[A, "first", B, text]], max_new_tokens=10)[0])
        assert view.continue_with(text, max_new_tokens=10) == whole
    assert view.ask("why", max_new_tokens=10) == str(
        model.generate([[A, "first", B, "Question: why Answer:"]], max_new_tokens=10)[0]
    )


def test_questions_do_not_disturb_one_another(model):
    view = model.see([A])
    first = view.ask("one?", max_new_tokens=8)
    view.ask("two, a longer one?", max_new_tokens=8)
    view.score(["yes", "no"])
    assert view.ask("one?", max_new_tokens=8) == first


def test_a_score_is_the_log_likelihood_of_the_whole_answer(model):
    candidates = ["yes", "no, not at all", "y"]
    scores = model.score([A, "is it?"], candidates)
    for candidate, score in zip(candidates, scores, strict=True):
        ids = [*model.lm.tokenize(f" {candidate}"), model.lm.eos]
        embeds, _ = model.prepare([[A, "is it?"]])
        whole = torch.cat([embeds, model.lm.embed(torch.tensor([ids]))], 1)
        with torch.no_grad():
            logits = model.lm.logits(whole, torch.ones(whole.shape[:2], dtype=torch.long))[0]
        steps = logits.log_softmax(-1)[embeds.shape[1] - 1 : -1]
        assert score == pytest.approx(float(steps[range(len(ids)), ids].sum()), abs=1e-3)
    normalized = model.score([A, "is it?"], candidates, normalize=True)
    assert normalized[1] == pytest.approx(scores[1] / (len(model.lm.tokenize(" no, not at all")) + 1))


def test_a_calibrated_connector_starts_at_the_spread_of_the_embeddings(tiny_parts):
    model = mllm.assemble(tiny_parts[0], tiny_parts[1], {"type": "linear", "tokens": 4})
    features = model.features([tiny_image(seed) for seed in range(8)])
    calibrate(model, features)
    spread = float(model.connector(features).detach().std())
    assert spread == pytest.approx(model.lm.embedding_scale(), rel=0.3)


def test_one_seed_draws_the_same_connector_and_another_seed_another(tiny_parts):
    weights = [mllm.assemble(tiny_parts[0], tiny_parts[1], seed=seed).connector.project.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "list of prompts"),
        ("a text", "list of prompts"),
        ([[]], "expected a list of texts"),
        ([["x"], [""]], "Prompt 1"),
        ([["x", 3]], "int is not an image"),
        ([["x", "half \ud83d"]], "lone surrogate"),
        ([["x" * 300]], "300 tokens"),
    ],
)
def test_a_bad_prompt_is_one_message(model, prompts, message):
    with pytest.raises(MLLMError, match=message):
        model.generate(prompts)


def test_empty_candidates_are_refused(model):
    with pytest.raises(MLLMError, match="candidate"):
        model.score([A], [])
    with pytest.raises(MLLMError, match="candidate"):
        model.score([A], ["x", " "])
    with pytest.raises(MLLMError, match="candidate"):
        model.score([A], ["x", 3])


def test_a_text_that_is_no_unicode_is_one_message_wherever_it_is_read(model):
    acts = [lambda: model.score([A, "x"], ["half \ud83d"]), lambda: model.see([A, "\udcff"]).score(["x"]),
            lambda: model.chat().send("\udcff"), lambda: model.lm.tokenize("\udcff", control=True)]  # fmt: skip
    for act in acts:
        with pytest.raises(MLLMError, match=r"lone surrogate.*UTF-8\.$"):
            act()


def test_calls_from_several_threads_answer_as_one_after_another(model):
    def call(number):
        prompt = [[A, B][number % 2], "what is it?"]
        if number % 3 == 0:
            return [str(model.generate([prompt], max_new_tokens=3, temperature=float(number % 2), seed=number)[0])]
        return model.score(prompt, ["yes", "a dog"]) if number % 3 == 1 else [model.see(prompt).ask("colour")]

    alone = [call(number) for number in range(9)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(call, range(9)))
    for one, other in zip(alone, together, strict=True):
        assert one == (other if isinstance(other[0], str) else pytest.approx(other, abs=1e-4))


def test_a_connector_argument_that_does_not_exist_is_named(tiny_parts):
    with pytest.raises(MLLMError, match=r"connector linear.*'tokenz'"):
        mllm.assemble(tiny_parts[0], tiny_parts[1], {"type": "linear", "tokenz": 4})
    with pytest.raises(MLLMError, match=r"connector.tokens is 5"):
        mllm.assemble(tiny_parts[0], tiny_parts[1], {"type": "linear", "tokens": 5})
