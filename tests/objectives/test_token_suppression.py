"""Token suppression: the loss over captions and generated texts, what it trains, and the objective's former name."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import mllm
from mllm import registry
from mllm.config.loading import check, load
from mllm.errors import MLLMError
from mllm.objectives.build import objectives_of
from mllm.objectives.retrieval import TokenPrediction
from mllm.objectives.token_suppression import TokenSuppression, generated_texts
from mllm.prompts.batch import IGNORED, Encoded
from mllm.prompts.pieces import Target
from mllm.slots import Inputs
from mllm.testing import tiny_image
from mllm.training.batches import inputs
from mllm.training.setup import parameter_groups

TOKENS = ["[IMG0]", "[IMG1]"]
HEAD = {"type": "bridge", "tokens": 2, "width": 8}
ROWS: list[list[Any]] = [
    [tiny_image(0), "A picture of", Target(" a cat")],
    [tiny_image(1), "A picture of", Target(" two red birds")],
]


@pytest.fixture
def model(tiny_model):
    model = tiny_model(heads=[HEAD], tokens=TOKENS)
    stages = [{"name": "s", "train": {"tokens": 0.1}, "steps": 1}]
    parameter_groups(model, check({"name": "x", "stages": stages}, "x").stages[0])
    return model


def inputs_of(model, rows=ROWS):
    rows, features, batch = inputs(model, rows, model.features)
    return Inputs(model, rows, features, batch)


def probabilities(model, ids):
    """Return the probability of the image's first token after each of the ids."""
    with torch.no_grad():
        logits = logits_of(model, ids)
    return logits.float().softmax(-1)[:, model.lm.new_tokens["[IMG0]"]]


def caption_ids(model, text):
    return model.lm.tokenize("A picture of" + text)


def sampled_texts(model):
    """Return three sampled texts, as the objective samples them."""
    start = Encoded([model.lm.eos], [False], [IGNORED])
    return generated_texts(model, [start] * 3, 6, range(3))


def test_generated_texts_are_those_of_the_bare_language_model(model):
    state = torch.get_rng_state()
    texts = sampled_texts(model)
    assert torch.equal(state, torch.get_rng_state())  # a resumed run samples again, with the same random state after
    with torch.no_grad():
        model.tokens.scores.fill_(100.0)  # would be generated at once
    assert texts == sampled_texts(model)
    assert all(len(text.ids) <= 7 and max(text.ids) < model.tokens.first for text in texts)
    assert len({tuple(text.ids) for text in texts}) == 3


def greedy(model, ids, length):
    """Return the greedy continuation, token by token, new tokens left out and the EOS included."""
    continuation: list[int] = []
    while len(continuation) < length and continuation[-1:] != [model.lm.eos]:
        logits = logits_of(model, [*ids, *continuation])
        continuation.append(int(logits[-1, : model.tokens.first].argmax()))
    return continuation


def test_the_loss_is_that_of_the_texts_and_trains_the_tokens_alone(model):
    objective = TokenSuppression(texts=3, length=6, together=2)
    assert model.lm.bos == []
    torch.manual_seed(2)
    loss = objective(inputs_of(model))
    torch.manual_seed(2)
    texts = [(" a cat", " two red birds")[index] for index in torch.randperm(2)]
    samples = [sampled_texts(model)[index] for index in torch.randperm(3)[:2]]
    image = [model.lm.new_tokens[token] for token in TOKENS]
    expected, before = [], len(caption_ids(model, ""))
    for text, sample in zip(texts, samples, strict=True):
        caption = caption_ids(model, text)
        continuation = greedy(model, [*caption, *image], 2)
        logits = logits_of(model, [*caption, *image, *continuation])
        expected += [nll(logits[before - 1 :], caption[before:]), nll(logits[len(caption) + 1 :], continuation)]
        expected.append(nll(logits_of(model, sample.ids), sample.ids[1:]))
    torch.testing.assert_close(loss, 2 * torch.cat(expected).mean(), atol=1e-4, rtol=1e-4)
    assert objective.count(ROWS, None) == 2
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["tokens.scores"]


def logits_of(model, ids):
    return model.lm.model(input_ids=torch.tensor([ids])).logits[0]


def nll(logits, ids):
    return torch.nn.functional.cross_entropy(logits[: len(ids)], torch.tensor(ids), reduction="none")


def test_a_token_that_was_always_generated_is_generated_after_captions_alone(model):
    texts, captions = sampled_texts(model), [caption_ids(model, text) for text in (" a cat", " two red birds")]
    with torch.no_grad():
        states = [model.lm.hidden(model.lm.embed(torch.tensor([t.ids])), torch.ones(1, len(t.ids)))[0] for t in texts]
        mean = torch.cat(states).mean(0)
        model.tokens.scores.copy_(16 * mean / mean.square().sum())
    optimizer = torch.optim.Adam(model.tokens.parameters(), lr=0.1)
    objectives: list[Any] = [TokenPrediction(), TokenSuppression(texts=4)]
    before = torch.cat([probabilities(model, text.ids) for text in texts]).mean()
    for _ in range(60):
        optimizer.zero_grad()
        batch = inputs_of(model)
        torch.stack([objective(batch) for objective in objectives]).sum().backward()
        optimizer.step()
    after = torch.cat([probabilities(model, text.ids) for text in texts]).mean()
    assert before > 0.3 and after < 0.05
    assert min(float(probabilities(model, ids)[-1]) for ids in captions) > 0.5


def test_unfit_options_data_and_stages_are_refused(model):
    with pytest.raises(MLLMError, match="texts 0, length 24, together 4: expected 1 or more of each"):
        TokenSuppression(texts=0)
    with pytest.raises(MLLMError, match="No example of a batch has a caption"):
        TokenSuppression()(Inputs(model, [["a cat"]], None, None))
    model.spec = model.spec.model_copy(update={"trained": ["lm"]})
    with pytest.raises(MLLMError, match="frozen language model generates, and in this stage the language model trains"):
        TokenSuppression()(Inputs(model, ROWS, None, None))


OLD_RECIPE = """
name: old
heads: [{type: bridge, tokens: 2, width: 8}]
stages:
  - {name: s, train: {tokens: 0.1}, steps: 1, objectives: [{type: token-prediction}, {type: silence, weight: 3.0}]}
"""


def test_an_old_recipe_and_its_saved_run_load_under_the_former_name_and_warn_once(model, tmp_path):
    run = tmp_path / "run"
    model.save(run / "model")
    (run / "recipe.yaml").write_text(OLD_RECIPE)
    registry.current_name.cache_clear()
    with pytest.warns(FutureWarning, match="'silence' of mllm.objectives is now called 'token-suppression'") as caught:
        (stage,) = load(str(run / "recipe.yaml")).stages
        loaded = mllm.load(run)
        objectives = [objectives_of(stage.objectives) for _ in range(2)][-1]
    assert len(caught) == 1
    assert [type(objective) for objective in objectives] == [TokenPrediction, TokenSuppression]
    assert stage.objectives[1].weight == 3.0
    assert torch.isfinite(objectives[1](inputs_of(loaded)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # neither the current name nor the former one warns again
        assert registry.lookup("objectives", "token-suppression") is registry.lookup("objectives", "silence")
