"""Image decoders: a text's condition gives the image of the text; a small decoder is fitted in closed form."""

from __future__ import annotations

import itertools
import json
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mllm
from mllm.build import load
from mllm.capabilities import ConditionHead
from mllm.config.loading import check
from mllm.decoders.diffusion import DiffusionPipeline
from mllm.decoders.trained import RunDecoder
from mllm.errors import MLLMError
from mllm.hub.fingerprints import tensor_hash
from mllm.objectives.distillation import ScoreDistillation
from mllm.planning.check import problems, unmet
from mllm.prompts.pieces import Target
from mllm.readout.states import read_captions
from mllm.slots import Inputs
from mllm.testing import tiny_image
from mllm.training.batches import inputs
from mllm.training.setup import parameter_groups

CAPTIONS = {"a red wall": (220, 30, 30), "a green wall": (30, 200, 40), "a blue wall": (40, 60, 220)}


def test_a_pipeline_makes_the_same_image_of_a_condition_and_of_its_text(pipeline):
    whole, folder = pipeline
    decoder = DiffusionPipeline(model=folder, steps=3, guidance=4.0)
    assert decoder.condition == DiffusionPipeline.shape(model=folder) == (8, 16)
    assert [name for name, part in decoder._text_pipeline.components.items() if isinstance(part, torch.nn.Module)] == [
        "text_encoder"  # the other modules are loaded when they are needed
    ]
    texts, seeds = ["a cat", "a dog"], [3, 4]
    conditions = decoder.encode(texts)
    torch.testing.assert_close(conditions, whole.encode_prompt(texts, "cpu", 1, False)[0])
    images = decoder.draw(conditions, seeds)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    expected = whole(texts, num_inference_steps=3, guidance_scale=4.0, generator=generators).images
    for image, other in zip(images, expected, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(other))
    (alone,) = decoder.draw(conditions[1:], [4])
    assert np.array_equal(np.asarray(alone), np.asarray(images[1]))  # batched and single results are equal
    assert decoder.fingerprint == DiffusionPipeline(model=folder).fingerprint


def test_a_head_learns_a_pipelines_condition(pipeline, tiny_model):
    _, folder = pipeline
    head = {"type": "generation", "tokens": 2, "length": 8, "width": 16, "dim": 16, "layers": 1, "heads": 2}
    decoder = {"type": "diffusers", "model": folder, "steps": 2}
    tokens = ["[IMG0]", "[IMG1]"]
    model = tiny_model(heads=[head], tokens=tokens, decoder=decoder)
    assert model.decoder.draw(model.find(ConditionHead)(*torch.randn(2, 1, 2, 32)), [0])[0].size == (8, 8)
    with pytest.raises(MLLMError, match="makes conditions of 77 x 16, and the image decoder takes 8 x 16"):
        tiny_model(heads=[{**head, "length": 77}], tokens=tokens, decoder=decoder)


HEAD = {"type": "generation", "tokens": 2, "length": 8, "width": 16, "dim": 16, "layers": 1, "heads": 2}
ROWS: list[list[Any]] = [
    [tiny_image(0), "A picture of", Target(" a cat")],
    ["no image", Target(" two red birds")],
    [tiny_image(1), "A picture of", Target(" a dog")],
]


def of_pipeline(tiny_model, folder):
    tokens = ["[IMG0]", "[IMG1]"]
    return tiny_model(heads=[HEAD], tokens=tokens, decoder={"type": "diffusers", "model": folder, "steps": 2})


def inputs_of(model):
    rows, features, batch = inputs(model, ROWS, model.features)
    return Inputs(model, rows, features, batch)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_condition_is_scored_by_the_pipelines_own_loss(pipeline, prediction, tmp_path):
    whole, folder = pipeline
    shutil.copytree(folder, tmp_path / "other")
    config = json.loads((tmp_path / "other/scheduler/scheduler_config.json").read_text())
    (tmp_path / "other/scheduler/scheduler_config.json").write_text(
        json.dumps({**config, "prediction_type": prediction})
    )
    decoder = DiffusionPipeline(model=str(tmp_path / "other"))
    conditions, images = torch.randn(2, 8, 16), [tiny_image(0), tiny_image(1)]
    torch.manual_seed(5)
    loss = decoder.denoise(images, conditions)
    torch.manual_seed(5)
    with torch.no_grad():
        pixels = [
            np.asarray(image.resize((8, 8), Image.Resampling.LANCZOS), np.float32) / 127.5 - 1 for image in images
        ]
        stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
        latents = whole.vae.encode(stacked).latent_dist.sample() * whole.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        steps = torch.randint(1000, (2,))
        predicted = whole.unet(whole.scheduler.add_noise(latents, noise, steps), steps, conditions).sample
        target = noise if prediction == "epsilon" else whole.scheduler.get_velocity(latents, noise, steps)
    torch.testing.assert_close(loss, ((predicted - target) ** 2).mean((1, 2, 3)))
    (tmp_path / "other/scheduler/scheduler_config.json").write_text(json.dumps({**config, "prediction_type": "sample"}))
    with pytest.raises(MLLMError, match="has a U-Net that predicts 'sample': score distillation needs"):
        DiffusionPipeline(model=str(tmp_path / "other")).denoise(images, conditions)


def test_a_head_learns_through_the_frozen_pipeline(pipeline, tiny_model):
    model = of_pipeline(tiny_model, pipeline[1])
    stage = check({"name": "x", "stages": [{"name": "s", "train": {"heads": 0.01}, "steps": 1}]}, "x").stages[0]
    groups, objective = parameter_groups(model, stage), ScoreDistillation()
    parts = [part for part in model.decoder._full_pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert len(parts) == 3  # vae, unet, text encoder
    before = [tensor_hash(part) for part in (*parts, model.lm, model.encoder, model.connector)]
    optimizer, losses = torch.optim.Adam(groups), []
    for _ in range(6):
        torch.manual_seed(0)  # the same noise
        loss = objective(inputs_of(model))
        optimizer.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))
    assert all(p.grad is not None for p in model.heads.parameters())
    frozen = [*model.lm.parameters(), *model.connector.parameters(), *model.tokens.parameters()]
    assert all(p.grad is None for p in [*frozen, *(p for part in parts for p in part.parameters())])
    assert before == [tensor_hash(part) for part in (*parts, model.lm, model.encoder, model.connector)]
    assert objective.count(ROWS, None) == 2
    captions = read_captions(inputs_of(model))
    torch.manual_seed(0)
    conditions = model.find(ConditionHead)(captions.states[[0, 2]], captions.embeddings[[0, 2]])
    expected = model.decoder.denoise([tiny_image(0), tiny_image(1)], conditions).sum()
    torch.manual_seed(0)
    torch.testing.assert_close(objective(inputs_of(model)), expected)


def test_a_recipe_trains_through_a_pipeline(pipeline, tiny_parts, tmp_path):
    tiny_image(0).save(tmp_path / "0.png")
    (tmp_path / "captions.json").write_text(json.dumps([{"image": "0.png", "caption": "a cat"}]))
    overrides = {
        "encoder.model": tiny_parts[0],
        "lm.model": tiny_parts[1],
        "heads": [HEAD],
        "tokens": ["[IMG0]", "[IMG1]"],
        "decoder": {"type": "diffusers", "model": pipeline[1], "steps": 2},
        "data.train": {"format": "table", "path": str(tmp_path / "captions.json"), "images": str(tmp_path)},
        "stages": [
            {
                "name": "draw",
                "train": {"heads": 1e-3},
                "objectives": [{"type": "score-distillation"}, {"type": "distillation", "weight": 0.5}],
                "steps": 2,
                "batch_size": 2,
            }
        ],
        "optim.warmup": 0,
    }
    run = mllm.train("gill", overrides, out=tmp_path / "run")
    rows = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert [row["score-distillation"] > 0 for row in rows] == [True, True]
    assert mllm.load(run.path).draw([["a cat"]])[0].image.size == (8, 8)


def test_score_distillation_is_refused_without_a_denoising_loss(tiny_model, tiny_decoder, pipeline):
    parts = {"heads": [{**HEAD, "length": 1, "width": 32}], "tokens": ["[IMG0]", "[IMG1]"]}
    values = {"name": "s", "train": ["heads"], "steps": 1, "objectives": [{"type": "score-distillation"}]}
    (stage,) = check({"name": "x", "stages": [values]}, "x").stages
    (problem,) = unmet(tiny_model(**parts, decoder={"type": "trained", "model": tiny_decoder}), stage)
    assert "needs an image decoder with a denoising loss" in problem
    model = of_pipeline(tiny_model, pipeline[1])
    assert unmet(model, stage) == []
    with pytest.raises(MLLMError, match="No example of a batch has a caption after an image"):
        ScoreDistillation()(Inputs(model, ROWS[1:2], None, None))


def test_a_pipeline_that_does_not_fit_is_refused(pipeline, tmp_path):
    with pytest.raises(MLLMError, match="There is no pipeline 'nobody/nothing'"):
        DiffusionPipeline(model="nobody/nothing")
    for name, content in {"text_encoder/config.json": {"hidden_size": 8}, "unet/config.json": {}}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps(content | {"cross_attention_dim": 16}))
    with pytest.raises(MLLMError, match="takes conditions of width 16, and its text encoder makes 8"):
        DiffusionPipeline(model=str(tmp_path))


@pytest.fixture(scope="module")
def walls(tmp_path_factory, tiny_parts):
    """Return a run of the recipe emoji-decoder on images of one color each."""
    folder = tmp_path_factory.mktemp("walls")
    rows = [{"image": f"{number}.png", "caption": caption} for number, caption in enumerate(CAPTIONS)]
    for row in rows:
        Image.new("RGB", (40, 40), CAPTIONS[row["caption"]]).save(folder / row["image"])
    (folder / "captions.json").write_text(json.dumps(rows))
    overrides = {
        "lm.model": tiny_parts[1],
        "heads.0.side": 16,
        "heads.0.features": 64,
        "heads.0.noise": 0.01,  # random weights give similar vectors
        "heads.0.sharpness": 5.0,
        "data.train": {"format": "table", "path": str(folder / "captions.json"), "images": str(folder)},
        "stages.0.fit.strength": 1e-6,
    }
    return str(mllm.train("emoji-decoder", overrides, out=folder / "run").path)


def test_a_fitted_decoder_makes_the_image_of_each_caption(walls):
    decoder = RunDecoder(model=load(walls))
    conditions = decoder.encode(list(CAPTIONS))
    assert decoder.condition == RunDecoder.shape(model=walls) == tuple(conditions.shape[1:])
    images = decoder.draw(conditions, [0, 0, 0])
    for image, colour in zip(images, CAPTIONS.values(), strict=True):
        mean = np.asarray(image).reshape(-1, 3).mean(0)
        closest = min(CAPTIONS.values(), key=lambda other: np.abs(mean - other).sum())
        assert image.size == (16, 16) and closest == colour
    (same,), (other,) = decoder.draw(conditions[1:2], [0]), decoder.draw(conditions[1:2], [1])
    assert np.array_equal(np.asarray(same), np.asarray(images[1]))
    assert not np.array_equal(np.asarray(other), np.asarray(images[1]))


def test_a_fit_of_the_pixels_head_is_checked(tiny_parts):
    fit = {"part": "heads.pixels"}
    (problem,) = problems("emoji-decoder", {"lm.model": tiny_parts[1], "stages.0.fit.targets": "sentences"})
    assert "fit of heads.pixels does not take" in problem and "targets" in problem
    several = problems("limber-cpu", {"encoder.model": tiny_parts[0], "lm.model": tiny_parts[1], "stages.0.fit": fit})
    assert several == [
        "Stage fit fits heads.pixels, which the model does not have.",
        "Stage fit fits heads.pixels, for which it needs a sentence encoder in the language model's slot: lm: "
        "{type: sentences, model: mllm/minilm}.",
    ]
    (absent,) = problems("emoji-decoder", {"lm.model": tiny_parts[1], "heads": []})
    assert "fits heads.pixels, which the model does not have" in absent


def test_a_run_without_the_pixels_head_is_no_decoder(tiny_model, tmp_path):
    tiny_model().save(tmp_path)
    with pytest.raises(MLLMError, match="does not generate images from sentences"):
        RunDecoder.shape(model=str(tmp_path))
