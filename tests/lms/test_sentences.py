"""Sentences in the language model's place: their vectors, the fit and the loss onto them, and the scorer of it."""

from __future__ import annotations

import csv
from importlib import import_module

import pytest
import torch
from transformers import BertConfig, BertModel

import mllm
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.media.images import source_of
from mllm.objectives.contrastive import SentenceContrastive
from mllm.planning.check import problems
from mllm.prompts.pieces import Target
from mllm.registry import lookup
from mllm.slots import Inputs
from mllm.testing import tiny_image, tiny_tokenizer

TEXTS = ["a red apple", "a dog", "two cats on a mat"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """The folder of a tiny BERT over bytes."""
    folder, tokenizer = tmp_path_factory.mktemp("tiny-bert"), tiny_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def model(tiny_parts, bert):
    return mllm.assemble(tiny_parts[0], {"type": "sentences", "model": bert}, {"type": "linear", "tokens": 1})


@pytest.fixture
def recipe(tiny_parts, bert, tmp_path):
    """A recipe that fits and trains on three pictures."""
    with (tmp_path / "train.csv").open("w") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        for number, text in enumerate(TEXTS):
            tiny_image(number).save(tmp_path / f"{number}.png")
            rows.writerow([f"{number}.png", text])
    path = tmp_path / "scorer.yaml"
    path.write_text(
        f"name: scorer\nencoder: {{model: {tiny_parts[0]}}}\nlm: {{type: sentences, model: {bert}}}\n"
        "connector: {type: linear, tokens: 1}\n"
        f"data: {{train: {{format: table, path: {tmp_path / 'train.csv'}}}}}\n"
        "stages:\n  - {name: fit, fit: {targets: sentences, strength: 1.0e-8}}\n"
        "  - {name: align, train: {connector: 1.0e-4}, objectives: [{type: contrastive}], steps: 2, batch_size: 3}\n"
    )
    return str(path)


@torch.no_grad()
def test_a_vector_is_the_mean_of_the_states_whatever_stands_beside_it(model):
    found = model.lm.sentences(TEXTS)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3))
    for text, vector in zip(TEXTS, found, strict=True):
        ids = model.lm.tokenizer(text, return_tensors="pt").input_ids
        mean = model.lm.model(input_ids=ids).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vector, mean / mean.norm(), atol=1e-5, rtol=1e-5)
    assert model.lm.sentences(["long " * 100]).shape == (1, model.lm.dim)


def test_it_makes_no_text_and_says_so(model):
    with pytest.raises(MLLMError, match="cannot answer"):
        model.generate([[tiny_image(), "A"]])
    with pytest.raises(MLLMError, match="quantize"):
        lookup("lms", "sentences")(model="x", quantize="8bit")


@torch.no_grad()
def test_the_loss_is_cross_entropy_both_ways_and_equal_texts_are_no_rivals(model):
    features = model.features([tiny_image(seed) for seed in range(3)])
    rows = [[tiny_image(seed), Target(text)] for seed, text in enumerate(TEXTS)]
    found = SentenceContrastive(temperature=0.1)(Inputs(model, rows, features, None))
    seen = torch.nn.functional.normalize(model.connector(features)[:, 0], dim=-1)
    odds = (seen @ model.lm.sentences(TEXTS).T / 0.1).double().exp()
    diagonal = odds.diagonal()
    expected = -((diagonal / odds.sum(1)).log() + (diagonal / odds.sum(0)).log()).sum() / 2
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    twins = [[tiny_image(), Target("a dog")]] * 2
    same = SentenceContrastive()(Inputs(model, twins, features[:1].expand(2, -1, -1), None))
    assert float(same) == pytest.approx(2 * float(torch.tensor(2.0).log()), rel=1e-5)  # no better than by lot
    with pytest.raises(MLLMError, match="1 images and 0 target texts"):
        SentenceContrastive()(Inputs(model, [[tiny_image(), "no target"]], features[:1], None))
    with pytest.raises(MLLMError, match="temperature"):
        SentenceContrastive(temperature=0.0)


def test_a_run_is_a_scorer_that_finds_what_it_was_fitted_to(recipe, tiny_model, tmp_path):
    assert problems(recipe) == []
    run = mllm.train(recipe, out=tmp_path / "run")
    scorer = lookup("scorers", "aligned")(model=mllm.load(run.path))
    pictures = [tiny_image(number) for number in range(3)]
    cosines = scorer.image_text(pictures, TEXTS)
    assert cosines.argmax(1).tolist() == [0, 1, 2]
    torch.testing.assert_close(scorer.embed_images(pictures).norm(dim=-1), torch.ones(3))
    speaker = tiny_model(scorer={"type": "aligned", "model": str(run.path)})
    torch.testing.assert_close(speaker.scorer.image_text(pictures, TEXTS), cosines)
    assert str(speaker.generate([[pictures[0], "A"]], candidates=2, max_new_tokens=2, seed=0)[0]) is not None
    own = mllm.load(run.path)
    torch.testing.assert_close(own.scorer.image_text(pictures, TEXTS), cosines)
    items = [
        Item(text, (source_of(picture),), (text,), choices=tuple(TEXTS))
        for picture, text in zip(pictures, TEXTS, strict=True)
    ]
    assert import_module("mllm.eval.answers.closest").closest(items, own.scorer, 0.0) == TEXTS


def test_what_does_not_fit_is_refused(recipe, tiny_parts, tiny_model, tmp_path):
    words = problems(recipe, {"stages.0.fit.targets": "caption-words"})
    assert any("targets=sentences" in problem for problem in words)
    spoken = problems(recipe, {"lm.type": "transformers", "lm.model": tiny_parts[1]})
    assert any("lm.type=sentences" in problem for problem in spoken)
    assert any("a sentence encoder in the language model's slot" in problem for problem in spoken), spoken
    tiny_model().save(tmp_path / "model")
    with pytest.raises(MLLMError, match="one space"):
        lookup("scorers", "aligned")(model=mllm.load(tmp_path / "model"))
