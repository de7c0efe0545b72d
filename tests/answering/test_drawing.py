"""Answers with images that are made: where the tokens stand, which seed, which of several; or looked up instead."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

import mllm
from mllm.capabilities import ConditionHead
from mllm.errors import MLLMError
from mllm.fits import decision as fits
from mllm.fits.base import Material
from mllm.objectives.decision import DecisionLoss
from mllm.outputs import ImagePart, Text
from mllm.prompts.pieces import Target
from mllm.readout.decision import decide, states_at
from mllm.scorers.index import ImageIndex
from mllm.slots import Inputs
from mllm.testing import tiny_image
from mllm.training.batches import inputs

TOKENS = ["[IMG0]", "[IMG1]", "[IMG2]"]
MAPPER = {"type": "generation", "tokens": 3, "length": 1, "width": 32, "dim": 16, "layers": 1, "heads": 2}
RETRIEVAL = {"type": "retrieval", "dim": 6, "token": "[IMG0]"}
PROMPTS: list[list[Any]] = [["A cat"], [tiny_image(7), "and a longer text"]]


@pytest.fixture
def model(tiny_model, tiny_decoder):
    decoder = {"type": "trained", "model": tiny_decoder}

    def made(*heads, **options):
        return tiny_model(heads=[MAPPER, *heads], tokens=TOKENS, decoder=decoder, **options)

    return made


@pytest.fixture
def paths(tmp_path):
    found = [tmp_path / "photos" / f"{number}.png" for number in range(3)]
    found[0].parent.mkdir()
    for number, path in enumerate(found):
        tiny_image(number).save(path)
    return found


def same(one, other):
    return np.array_equal(np.asarray(one), np.asarray(other))


def condition(model, prompt):
    """What the head makes of the tokens behind a prompt, computed alone."""
    embeds, _ = model.prepare([prompt])
    behind = model.lm.embed(torch.tensor([[model.lm.new_tokens[token] for token in TOKENS]]))
    embeds = torch.cat([embeds, behind], 1)
    states = model.lm.hidden(embeds, torch.ones(embeds.shape[:2], dtype=torch.long))[:, -3:]
    return model.find(ConditionHead)(states, behind), states[0, 0]


@torch.no_grad()
def test_an_image_is_drawn_of_the_states_behind_the_prompt(model):
    model = model()
    got = model.draw(PROMPTS, seed=5)
    for prompt, part in zip(PROMPTS, got, strict=True):
        (expected,) = model.decoder.draw(condition(model, prompt)[0], [5])
        assert part.image.size == (16, 16) and np.abs(np.asarray(part.image, int) - np.asarray(expected)).max() <= 1
        assert (part.seed, part.source, part.score, part.candidates) == (5, model.decoder.label, None, ())


@torch.no_grad()
def test_of_several_the_closest_comes_first(model):
    model = model(RETRIEVAL)
    (part,) = model.draw(PROMPTS[:1], count=3, seed=2)
    every = [part, *part.candidates]
    assert sorted(one.seed for one in every) == [2, 3, 4]
    head, state = model.heads["retrieval"], condition(model, PROMPTS[0])[1]
    wanted = head.of_states(state[None])[0]
    scores = [float(head.of_features(model.features([one.image]))[0] @ wanted) for one in every]
    assert [one.score for one in every] == pytest.approx(scores, abs=1e-4) and scores == sorted(scores, reverse=True)


def test_where_the_model_says_the_first_token_the_others_follow_and_an_image_stands(model):
    model = model()
    plain = model.generate(PROMPTS, images=0, max_new_tokens=7)
    never = model.generate(PROMPTS, image_logit_bias=-1e4, max_new_tokens=7)
    assert [str(answer) for answer in plain] == [str(answer) for answer in never]
    ids = model.lm.new_tokens
    for cut in (1, 2, 7):  # where the limit cuts the tokens short, the image stands all the same
        for prompt, answer in zip(
            PROMPTS, model.generate(PROMPTS, image_logit_bias=1e4, max_new_tokens=cut), strict=True
        ):
            assert isinstance(answer[0], ImagePart) and same(answer[0].image, model.draw([prompt])[0].image)
            assert len(answer.images) == (2 if cut == 7 else 1)  # at once again is not forced: three tokens, one, three
            assert str(answer) == "".join(part for part in answer if isinstance(part, Text))
    assert model.lm.decode([ids["[IMG0]"], ids["[IMG1]"]]) == ""
    (first,), (second,) = (
        [a.images[0]] for a in model.generate(PROMPTS[:1] * 2, image_logit_bias=1e4, max_new_tokens=3)
    )
    assert same(first.image, second.image) and first.seed == 0


@pytest.mark.parametrize(("bias", "way"), [([9.0, 0.0], "retrieve"), ([0.0, 9.0], "generate")])
def test_the_decision_head_says_whether_an_image_is_looked_up_or_made(model, paths, bias, way):
    model = model(RETRIEVAL, {"type": "decision"})
    index = ImageIndex.build(model, paths)
    with torch.no_grad():
        model.heads["decision"].judge.weight.zero_()
        model.heads["decision"].judge.bias.copy_(torch.tensor(bias))
    (answer,) = model.generate(PROMPTS[:1], index=index, images=2, image_logit_bias=1e4, max_new_tokens=3)
    (part,) = answer.images
    assert (part.seed is None) == (way == "retrieve") and len(part.candidates) == 1
    assert part.source in ([str(path) for path in paths] if way == "retrieve" else [model.decoder.label])
    (made,) = model.generate(PROMPTS[:1], image_logit_bias=1e4, max_new_tokens=3)
    assert made.images[0].seed == 0  # without an index there is nothing to decide


def test_the_decision_is_learnt_from_labels_alone(model):
    model = model({"type": "decision", "dropout": 0.0})
    rows: Any = [["a cat", Target(" retrieve")], [tiny_image(1), "a dog", Target(" generate")]]
    model.heads.requires_grad_(True)
    model.tokens.requires_grad_(False), model.lm.requires_grad_(False), model.connector.requires_grad_(False)
    rows, features, batch = inputs(model, rows, model.features)
    loss = DecisionLoss()(Inputs(model, rows, features, batch))
    states = torch.stack([condition(model, row[:-1])[1] for row in rows])
    logits = model.heads["decision"].judge(states)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1]), reduction="sum"))
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0] == [
        "heads.decision.judge.weight",
        "heads.decision.judge.bias",
    ]
    with pytest.raises(MLLMError, match="one answer, of retrieve, generate: got 'yes'"):
        DecisionLoss()(Inputs(model, [["a cat", Target(" yes")]], None, None))


def test_the_decision_in_closed_form_is_sklearns_ridge_of_states_to_labels(model):
    model = model({"type": "decision"})
    prompts: list[list[Any]] = [[f"{word} {number}"] for word in ("a cat", "two dogs") for number in range(6)]
    prompts[3] = [tiny_image(3), "a picture"]
    labels = ["retrieve", "generate", "generate"] * 4
    rows = [[*prompt, Target(f" {label}")] for prompt, label in zip(prompts, labels, strict=True)]
    explained = fits.DecisionFit(part="heads.decision", strength=0.001, chunk=5)(model, Material(examples=lambda: rows))
    states = torch.stack([condition(model, prompt)[1] for prompt in prompts]).detach().double().numpy()
    wanted = np.array([[label == "retrieve", label == "generate"] for label in labels], float)
    expected = Ridge(alpha=0.001 * states.var(0).mean() * len(states)).fit(states, wanted)
    assert np.allclose(model.heads["decision"].judge.weight.detach().numpy(), expected.coef_, atol=1e-3)
    # The rows are fitted shortest prompt first, in chunks of 5, of which the last is held out.
    order = sorted(range(12), key=lambda index: sum(len(piece) for piece in prompts[index] if isinstance(piece, str)))
    held = [order[4], order[9], order[11]]
    kept = [index for index in order if index not in held]
    alpha = 0.001 * states[kept].var(0).mean() * len(kept)
    left = (wanted[held] - Ridge(alpha=alpha).fit(states[kept], wanted[kept]).predict(states[held])) ** 2
    assert explained == pytest.approx(1 - left.sum() / ((wanted[held] - wanted[held].mean(0)) ** 2).sum(), abs=1e-3)
    visual = model.connector(model.features([tiny_image(3)]))
    found = decide(model, states_at(model, prompts, visual))
    assert np.array_equal(found, np.where(expected.predict(states).argmax(1) == 0, "retrieve", "generate"))


def test_it_is_saved_and_loaded_and_refused_where_it_cannot_draw(model, tiny_model, tmp_path):
    first = model(RETRIEVAL)
    first.save(tmp_path)
    assert same(mllm.load(tmp_path).draw(PROMPTS)[0].image, first.draw(PROMPTS)[0].image)
    with pytest.raises(MLLMError, match="makes no images"):
        tiny_model().draw(PROMPTS)
    with pytest.raises(MLLMError, match="leave out 'candidates', or set images=0"):
        first.generate(PROMPTS, candidates=2)
    with pytest.raises(MLLMError, match="0 images are asked for"):
        first.draw(PROMPTS, count=0)
