"""Where no image belongs its tokens are not said: in texts of the language model's own, and within captions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mllm.config.loading import check
from mllm.errors import MLLMError
from mllm.objectives.retrieval import TokenPrediction
from mllm.objectives.silence import Silence, own_texts
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


def chances(model, ids):
    """The first token's chance behind each of the ids."""
    with torch.no_grad():
        logits = logits_of(model, ids)
    return logits.float().softmax(-1)[:, model.lm.new_tokens["[IMG0]"]]


def words(model, text):
    return model.lm.tokenize("A picture of" + text)


def sampled(model):
    """Three texts of the model's own, as the objective samples them."""
    start = Encoded([model.lm.eos], [False], [IGNORED])
    return own_texts(model, [start] * 3, 6, range(3))


def test_its_own_texts_are_those_of_the_bare_language_model(model):
    state = torch.get_rng_state()
    found = sampled(model)
    assert torch.equal(state, torch.get_rng_state())  # a resumed run samples again, and goes on as if it had not
    with torch.no_grad():
        model.tokens.scores.fill_(100.0)  # would be said at once
    assert found == sampled(model)
    assert all(len(text.ids) <= 7 and max(text.ids) < model.tokens.first for text in found)
    assert len({tuple(text.ids) for text in found}) == 3


def likeliest(model, ids, length):
    """What follows, word by word, new tokens left out; the end included."""
    said: list[int] = []
    while len(said) < length and said[-1:] != [model.lm.eos]:
        said.append(int(logits_of(model, [*ids, *said])[-1, : model.tokens.first].argmax()))
    return said


def test_the_loss_is_that_of_the_texts_and_trains_the_tokens_alone(model):
    objective = Silence(texts=3, length=6, together=2)
    assert model.lm.bos == []
    torch.manual_seed(2)
    loss = objective(inputs_of(model))
    torch.manual_seed(2)
    texts = [(" a cat", " two red birds")[place] for place in torch.randperm(2)]
    own = [sampled(model)[place] for place in torch.randperm(3)[:2]]
    image = [model.lm.new_tokens[token] for token in TOKENS]
    expected, before = [], len(words(model, ""))
    for text, other in zip(texts, own, strict=True):
        first = words(model, text)
        behind = likeliest(model, [*first, *image], 2)
        logits = logits_of(model, [*first, *image, *behind])
        expected += [nll(logits[before - 1 :], first[before:]), nll(logits[len(first) + 1 :], behind)]
        expected.append(nll(logits_of(model, other.ids), other.ids[1:]))
    torch.testing.assert_close(loss, 2 * torch.cat(expected).mean(), atol=1e-4, rtol=1e-4)
    assert objective.count(ROWS, None) == 2
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["tokens.scores"]


def logits_of(model, ids):
    return model.lm.model(input_ids=torch.tensor([ids])).logits[0]


def nll(logits, ids):
    return torch.nn.functional.cross_entropy(logits[: len(ids)], torch.tensor(ids), reduction="none")


def test_a_token_that_was_said_always_is_said_behind_captions_alone(model):
    texts, captions = sampled(model), [words(model, text) for text in (" a cat", " two red birds")]
    with torch.no_grad():
        states = [model.lm.hidden(model.lm.embed(torch.tensor([t.ids])), torch.ones(1, len(t.ids)))[0] for t in texts]
        mean = torch.cat(states).mean(0)
        model.tokens.scores.copy_(16 * mean / mean.square().sum())
    optimizer = torch.optim.Adam(model.tokens.parameters(), lr=0.1)
    objectives: list[Any] = [TokenPrediction(), Silence(texts=4)]
    before = torch.cat([chances(model, text.ids) for text in texts]).mean()
    for _ in range(60):
        optimizer.zero_grad()
        given = inputs_of(model)
        torch.stack([objective(given) for objective in objectives]).sum().backward()
        optimizer.step()
    after = torch.cat([chances(model, text.ids) for text in texts]).mean()
    assert before > 0.3 and after < 0.05
    assert min(float(chances(model, ids)[-1]) for ids in captions) > 0.5


def test_what_does_not_fit_is_refused(model):
    with pytest.raises(MLLMError, match="texts 0, length 24, together 4: expected 1 or more of each"):
        Silence(texts=0)
    with pytest.raises(MLLMError, match="No example of a batch has a caption"):
        Silence()(Inputs(model, [["a cat"]], None, None))
    model.spec = model.spec.model_copy(update={"trained": ["lm"]})
    with pytest.raises(MLLMError, match="what the language model says by itself, and here it trains"):
        Silence()(Inputs(model, ROWS, None, None))
