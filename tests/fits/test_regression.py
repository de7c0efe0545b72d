"""Lexical matching: the connector is fitted on the tokens' strings, without images."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LinearRegression

import mllm
from mllm.encoders.dual_encoder import DualEncoder
from mllm.errors import MLLMError
from mllm.fits.base import Material
from mllm.fits.connector import ConnectorFit
from mllm.lms.vocabulary import lexicon
from mllm.planning.check import problems
from mllm.testing import tiny_image


@pytest.fixture
def model(tiny_clip, tiny_parts):
    return mllm.assemble({"type": "dual-encoder", "model": tiny_clip}, tiny_parts[1], "linear")


def test_the_encoder_is_the_scorers_image_side(model, tiny_clip):
    images = [tiny_image(seed) for seed in range(3)]
    scorer = DualEncoder(model=tiny_clip)
    torch.testing.assert_close(model.features(images)[:, 0], scorer.embed_images(images))
    torch.testing.assert_close(model.encoder.encode_texts(["a cat"])[:, 0], scorer.embed_texts(["a cat"]))
    assert (model.encoder.num_patches, model.encoder.dim, model.encoder.grid) == (1, 12, None)


@torch.no_grad()
def test_it_is_least_squares_from_strings_to_embeddings(model):
    words = lexicon(model.lm)
    assert [text for _, text in words if text.isascii()] == sorted(
        [chr(letter) for letter in (*range(65, 91), *range(97, 123))]
    )
    explained = ConnectorFit(targets="tokens", solver="least-squares", chunk=20)(model, Material())
    x = model.encoder.encode_texts([text for _, text in words])[:, 0].double()
    y = model.lm.embed(torch.tensor([token for token, _ in words])).double()
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1).double()], dim=1), y).solution
    predicted = model.connector(x.float()[:, None])[:, 0].double()
    torch.testing.assert_close(predicted, x @ solution[:-1] + solution[-1], atol=1e-3, rtol=1e-3)
    kept = [row for row in range(len(x)) if row % 20 < (18 if row < 40 else 10)]  # of 20, 20 and 12 rows
    held = [row for row in range(len(x)) if row not in kept]
    expected = LinearRegression().fit(x[kept].numpy(), y[kept].numpy())
    left = ((y[held].numpy() - expected.predict(x[held].numpy())) ** 2).sum()
    assert explained == pytest.approx(1 - left / float(((y[held] - y[held].mean(0)) ** 2).sum()), abs=1e-3)


@pytest.mark.parametrize("solver", ["ridge", "procrustes"])
def test_it_is_a_stage_that_needs_no_data(tiny_clip, tiny_parts, tmp_path, solver):
    recipe = tmp_path / "sitta.yaml"
    recipe.write_text(
        f"name: sitta\nencoder: {{type: dual-encoder, model: {tiny_clip}}}\nlm: {{model: {tiny_parts[1]}}}\n"
        f"connector: {{type: linear}}\nstages: [{{name: fit, fit: {{targets: tokens, solver: {solver}}}}}]\n"
    )
    assert problems(str(recipe)) == []
    run = mllm.train(str(recipe), out=tmp_path / "run")
    model = mllm.load(run.path)
    assert model.connector.project.weight.abs().max() > 0
    assert str(model.generate([[tiny_image(), "A"]], max_new_tokens=2)[0]) is not None
    messages = problems(str(recipe), {"encoder.type": "transformers"})
    assert any("encoder.type=dual-encoder" in message for message in messages)


def test_a_retrieval_heads_solver_is_refused():
    with pytest.raises(MLLMError, match="connector has solver 'correlation': expected one of ridge, least-squares"):
        ConnectorFit(solver="correlation")


def test_an_encoder_without_texts_is_refused(tiny_parts):
    with pytest.raises(MLLMError, match="dual-encoder"):
        ConnectorFit(targets="tokens")(mllm.assemble(*tiny_parts), Material())
