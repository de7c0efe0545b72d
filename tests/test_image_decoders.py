"""Image decoders: what they draw of a condition is what they draw of the text; a small one is fitted here."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mllm
from mllm import recipe
from mllm.check import problems
from mllm.errors import MLLMError
from mllm.image_decoders.diffusion import DiffusionPipeline
from mllm.image_decoders.trained import Trained

CAPTIONS = {"a red wall": (220, 30, 30), "a green wall": (30, 200, 40), "a blue wall": (40, 60, 220)}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A tiny Stable Diffusion with random weights, and the folder it is saved in."""
    diffusers = pytest.importorskip("diffusers")
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text = CLIPTextConfig(
        **sizes,
        num_attention_heads=2,
        vocab_size=54,
        max_position_embeddings=8,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    made = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8),
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=8),
        unet=unet,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("pipeline")
    made.save_pretrained(folder)
    return made, str(folder)


def test_a_pipeline_draws_of_a_condition_what_it_draws_of_the_text(pipeline):
    whole, folder = pipeline
    decoder = DiffusionPipeline(model=folder, steps=3, guidance=4.0)
    assert decoder.condition == DiffusionPipeline.shape(model=folder) == (8, 16)
    assert [name for name, part in decoder._texts.components.items() if isinstance(part, torch.nn.Module)] == [
        "text_encoder"  # the rest is loaded when it is needed
    ]
    texts, seeds = ["a cat", "a dog"], [3, 4]
    conditions = decoder.encode(texts)
    torch.testing.assert_close(conditions, whole.encode_prompt(texts, "cpu", 1, False)[0])
    got = decoder.draw(conditions, seeds)
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    expected = whole(texts, num_inference_steps=3, guidance_scale=4.0, generator=draws).images
    for one, other in zip(got, expected, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))
    (again,) = decoder.draw(conditions[1:], [4])
    assert np.array_equal(np.asarray(again), np.asarray(got[1]))  # a batch gives what its members give alone
    assert decoder.fingerprint == DiffusionPipeline(model=folder).fingerprint


def test_a_head_learns_a_pipelines_condition(pipeline, tiny_model):
    _, folder = pipeline
    head = {"type": "generation", "tokens": 2, "length": 8, "width": 16, "dim": 16, "layers": 1, "heads": 2}
    decoder = {"type": "diffusers", "model": folder, "steps": 2}
    tokens = ["[IMG0]", "[IMG1]"]
    model = tiny_model(heads=[head], tokens=tokens, decoder=decoder)
    assert model.decoder.draw(model.painter(*torch.randn(2, 1, 2, 32)), [0])[0].size == (8, 8)
    with pytest.raises(MLLMError, match="makes conditions of 77 x 16, and the image decoder takes 8 x 16"):
        tiny_model(heads=[{**head, "length": 77}], tokens=tokens, decoder=decoder)


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
    """A run of the recipe emoji-decoder on pictures of one colour each."""
    folder = tmp_path_factory.mktemp("walls")
    rows = [{"image": f"{number}.png", "caption": caption} for number, caption in enumerate(CAPTIONS)]
    for row in rows:
        Image.new("RGB", (40, 40), CAPTIONS[row["caption"]]).save(folder / row["image"])
    (folder / "captions.json").write_text(json.dumps(rows))
    overrides = {
        "lm.model": tiny_parts[1],
        "heads.0.side": 16,
        "heads.0.features": 64,
        "heads.0.noise": 0.01,  # the vectors of random weights are much alike
        "heads.0.sharpness": 5.0,
        "data.train": {"format": "table", "path": str(folder / "captions.json"), "images": str(folder)},
        "stages.0.fit.strength": 1e-6,
    }
    return str(mllm.train("emoji-decoder", overrides, out=folder / "run").path)


def test_a_decoder_that_was_fitted_here_draws_what_it_is_told(walls):
    decoder = Trained(model=walls)
    conditions = decoder.encode(list(CAPTIONS))
    assert decoder.condition == Trained.shape(model=walls) == tuple(conditions.shape[1:])
    images = decoder.draw(conditions, [0, 0, 0])
    for image, colour in zip(images, CAPTIONS.values(), strict=True):
        mean = np.asarray(image).reshape(-1, 3).mean(0)
        closest = min(CAPTIONS.values(), key=lambda other: np.abs(mean - other).sum())
        assert image.size == (16, 16) and closest == colour
    (same,), (other,) = decoder.draw(conditions[1:2], [0]), decoder.draw(conditions[1:2], [1])
    assert np.array_equal(np.asarray(same), np.asarray(images[1]))
    assert not np.array_equal(np.asarray(other), np.asarray(images[1]))


def test_what_is_fitted_to_pictures_is_checked(tiny_parts):
    fit = {"part": "heads.pixels"}
    with pytest.raises(MLLMError, match="targets are the connector's: leave them out"):
        recipe.load("emoji-decoder", {"stages.0.fit.targets": "sentences"})
    (found,) = problems("limber-cpu", {"encoder.model": tiny_parts[0], "lm.model": tiny_parts[1], "stages.0.fit": fit})
    assert "Stage fit fits pictures: give lm.type=sentences and heads" in found
    (found,) = problems("emoji-decoder", {"lm.model": tiny_parts[1], "heads": []})
    assert "fits pictures" in found


def test_a_run_that_draws_nothing_is_no_decoder(tiny_model, tmp_path):
    tiny_model().save(tmp_path)
    with pytest.raises(MLLMError, match="makes no pictures of sentences"):
        Trained(model=str(tmp_path))
