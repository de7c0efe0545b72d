"""Heads that make conditions: the papers' modules and losses, from the states that retrieval reads too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import nn
from torch.nn.functional import log_softmax

from mllm.capabilities import ConditionHead
from mllm.config.loading import check
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.fits.affine import AffineFit
from mllm.fits.base import Material
from mllm.objectives.distillation import Distillation
from mllm.objectives.retrieval import RetrievalContrast, TokenPrediction
from mllm.prompts.pieces import Target
from mllm.registry import lookup
from mllm.slots import Inputs
from mllm.testing import tiny_image
from mllm.training.batches import inputs
from mllm.training.setup import parameter_groups

NAMES = ["[IMG0]", "[IMG1]", "[IMG2]"]
SMALL = {"tokens": 3, "length": 1, "width": 32}
MAPPER = {"type": "generation", "dim": 16, "layers": 1, "heads": 2, **SMALL}
ROWS = [
    [tiny_image(0), "A picture of", Target(" a cat")],
    ["no image", Target(" two red birds")],
    [tiny_image(1), "A picture of", Target(" a cat")],
]


def parts(decoder, *heads):
    return {"heads": list(heads), "tokens": NAMES, "decoder": {"type": "trained", "model": decoder}}


def inputs_of(model, rows=ROWS):
    rows, features, batch = inputs(model, rows, model.features)
    return Inputs(model, rows, features, batch)


class Published(nn.Module):
    """The mapper as the paper's authors wrote it down: one module of torch, pre-norm."""

    def __init__(self, lm_dim, out, length, dim, layers, heads):
        super().__init__()
        self.fc, self.model = nn.Linear(lm_dim, dim), nn.Linear(dim, out)
        self.query_embs = nn.Parameter(torch.randn(1, length, dim))
        with pytest.warns(UserWarning, match="enable_nested_tensor"):
            self.tfm = nn.Transformer(dim, heads, layers, layers, 4 * dim, 0.0, batch_first=True, norm_first=True)

    def forward(self, x, input_embs):
        x = self.fc(x + input_embs)
        return self.model(self.tfm(x, self.query_embs.repeat(x.shape[0], 1, 1)))


def test_the_mapper_is_the_published_one():
    size = {"length": 5, "dim": 16, "layers": 2, "heads": 4}
    theirs, ours = Published(24, 12, **size), lookup("heads", "generation")(lm_dim=24, tokens=3, width=12, **size)
    renamed = {"enter": "fc", "leave": "model", "transformer": "tfm", "queries": "query_embs"}
    known = theirs.state_dict()
    ours.load_state_dict(
        {
            name: known[".".join([renamed[name.split(".")[0]], *name.split(".")[1:]])].reshape(tensor.shape)
            for name, tensor in ours.state_dict().items()
        }
    )
    states, embeddings = torch.randn(2, 3, 24), torch.randn(2, 3, 24)
    torch.testing.assert_close(ours(states, embeddings), theirs(states, embeddings))
    with torch.device("meta"):
        whole = lookup("heads", "generation")(lm_dim=4096)
    assert sum(p.numel() for p in whole.parameters()) == 31_958_784
    assert whole.condition == (77, 768)


def alone(model, text):
    """The states at the tokens behind a caption, their embeddings, and the logits before them, computed alone."""
    ids = torch.tensor([[*model.lm.tokenize("A picture of" + text), *(model.lm.new_tokens[name] for name in NAMES)]])
    embeds = model.lm.embed(ids)
    output = model.lm.model(inputs_embeds=embeds, output_hidden_states=True)
    return output.hidden_states[-1][:, -3:], embeds[:, -3:], output.logits[0, -4]


def test_losses_are_the_papers_formulas(tiny_model, tiny_decoder):
    model = tiny_model(**parts(tiny_decoder, MAPPER, {"type": "retrieval", "token": "[IMG0]"}))
    given, head = inputs_of(model), model.heads["generation"]
    expected, predicted = torch.zeros(()), torch.zeros(())
    for text in (" a cat", " two red birds", " a cat"):
        states, embeddings, logits = alone(model, text)
        wanted = model.decoder.encode([text.strip()])
        expected = expected + (head(states, embeddings) - wanted).square().sum(-1).sqrt().mean()
        predicted = predicted - log_softmax(logits, -1)[model.lm.new_tokens["[IMG0]"]]
    torch.testing.assert_close(Distillation()(given), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(TokenPrediction()(given), predicted, atol=1e-4, rtol=1e-4)
    assert Distillation().count(ROWS, given.batch) == TokenPrediction().count(ROWS, given.batch) == 3
    state = alone(model, " a cat")[0][:, 0]
    torch.testing.assert_close(given.shared["captions"].states[[0, 2], 0], state.expand(2, -1), atol=1e-4, rtol=1e-4)
    assert RetrievalContrast().count(ROWS, given.batch) == 2
    assert RetrievalContrast()(given).isfinite()


def test_a_condition_is_computed_once_for_a_caption(tiny_model, tiny_decoder, monkeypatch):
    model = tiny_model(**parts(tiny_decoder, MAPPER))
    objective, asked, plain = Distillation(), [], model.decoder.encode

    def encode(texts):
        asked.extend(texts)
        return plain(texts)

    monkeypatch.setattr(model.decoder, "encode", encode)
    losses = [objective(inputs_of(model)) for _ in range(2)]
    assert asked == ["a cat", "two red birds"] and torch.equal(*losses)


@pytest.mark.parametrize(
    "head",
    [MAPPER, {"type": "bridge", "tokens": 1, "width": 32}, {"type": "aligner", "layers": 1, "heads": 2, **SMALL}],
)
def test_any_head_of_the_slot_trains_and_nothing_else(head, tiny_model, tiny_decoder):
    model = tiny_model(**parts(tiny_decoder, head))
    train = {"heads": 0.1, "tokens": 0.1}
    stage = check({"name": "x", "stages": [{"name": "s", "train": train, "steps": 1}]}, "x").stages[0]
    parameter_groups(model, stage)
    Distillation(distance="squared")(inputs_of(model, [["", Target(" by text alone")]])).backward()
    assert all(p.grad is not None for p in model.heads.parameters())
    assert model.tokens.rows.grad[: head["tokens"]].abs().sum(-1).all()
    assert all(p.grad is None for n, p in model.named_parameters() if n.split(".")[0] not in train)
    assert model.find(ConditionHead)(*(torch.randn(2, head["tokens"], 32) for _ in range(2))).shape == (
        2,
        *model.find(ConditionHead).condition,
    )


def test_the_affine_head_is_sklearns_ridge_of_states_to_conditions(tiny_model, tiny_decoder):
    model = tiny_model(**parts(tiny_decoder, {"type": "affine", **SMALL}))
    texts = [f"{word} {number}" for word in ("a cat", "two dogs") for number in range(8)]
    items = [Item(str(i), (), (text, f" {text}")) for i, text in enumerate(texts)]  # the same once more counts once
    explained = AffineFit(part="heads.affine", strength=0.1, chunk=5)(
        model, Material([*items, Item("asked", (), ("yes",), "Is it?")])
    )
    with torch.no_grad():
        states = torch.cat([alone(model, f" {text}")[0].flatten(1) for text in texts]).double().numpy()
        wanted = model.decoder.encode(texts).flatten(1).double().numpy()
    expected = Ridge(alpha=0.1 * states.var(0).mean() * len(texts)).fit(states, wanted)
    assert np.allclose(model.heads["affine"].project.weight.detach().numpy(), expected.coef_, atol=1e-4)
    kept, held = [0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 15], [4, 9, 14]  # the last of each chunk of 5 is held out
    alpha = 0.1 * states[kept].var(0).mean() * len(kept)
    left = (wanted[held] - Ridge(alpha=alpha).fit(states[kept], wanted[kept]).predict(states[held])) ** 2
    assert explained == pytest.approx(1 - left.sum() / ((wanted[held] - wanted[held].mean(0)) ** 2).sum(), abs=1e-3)


def test_what_does_not_fit_is_refused_before_anything_loads(tiny_model, tiny_decoder, tmp_path, monkeypatch):
    with pytest.raises(MLLMError, match=r"reads '\[RET\]', and an image's tokens are \['\[IMG0\]', '\[IMG1\]', '\["):
        model = tiny_model(**parts(tiny_decoder, MAPPER, {"type": "retrieval"}) | {"tokens": [*NAMES, "[RET]"]})
        Distillation()(inputs_of(model))
    with pytest.raises(MLLMError, match="has tokens=0; expected a number of at least 1"):
        tiny_model(**parts(tiny_decoder, {**MAPPER, "tokens": 0}))
    monkeypatch.setattr("mllm.build.build_encoder", lambda _: pytest.fail("an encoder was built"))
    with pytest.raises(MLLMError, match="makes conditions of 77 x 32, and the image decoder takes 1 x 32"):
        tiny_model(**parts(tiny_decoder, {**MAPPER, "length": 77}))
    with pytest.raises(MLLMError, match="There is no model in"):
        tiny_model(**parts(str(tmp_path), MAPPER))
    with pytest.raises(MLLMError, match="does not take these arguments"):
        tiny_model(**parts(tiny_decoder, {**MAPPER, "depth": 3}))
