"""Test images that are cut into tiles: as `transformers` cuts and joins them, in batches, views, chats and training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AddedToken,
    AutoModel,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    InternVLVisionModel,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    ViTImageProcessorPil,
)

import mllm
from mllm.errors import MLLMError
from mllm.model import Model
from mllm.prompts.batch import collate
from mllm.testing import tiny_lm

SIDE = 32
RANDOM = np.random.default_rng(0)
# Landscape, portrait, square, smaller than a tile, a pixel, both ends of what is accepted, and equally good grids.
SIZES = [(97, 33), (40, 31), (31, 40), (64, 64), (20, 90), (300, 200), (7, 9), (1, 1), (400, 2), (2, 400), (33, 32)]
IMAGES = [Image.fromarray(RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in SIZES]
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]  # LLaVA-NeXT's, for tiles of 32 pixels
SHAPE: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}


def randomized(module: Any, seed: int = 0) -> Any:
    """Draw all weights anew, biases and newline tokens too, which are zero or small otherwise."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_lm(tmp_path_factory.mktemp("lm"), context=4096)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    randomized(CLIPVisionModel(CLIPVisionConfig(**SHAPE, image_size=SIDE, patch_size=8))).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(
        folder
    )
    return str(folder)


@pytest.fixture(scope="module")
def internvit(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("internvit")
    config = InternVLVisionConfig(**SHAPE, image_size=[SIDE, SIDE], patch_size=[8, 8])
    randomized(InternVLVisionModel(config)).save_pretrained(folder)
    ViTImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, resample=3, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25]
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def anyres(clip: str, lm: str) -> Any:
    encoder = {"model": clip, "layer": -2, "tiles": {"kind": "anyres"}}
    model = mllm.assemble(encoder, lm, {"type": "mlp"}, device="cpu")
    randomized(model.connector, seed=1)
    return model


@pytest.fixture(scope="module")
def dynamic(internvit: str, lm: str) -> Any:
    encoder = {"model": internvit, "layer": -1, "tiles": {"kind": "dynamic", "most": 6}}
    connector = {"type": "mlp", "shuffle": 2, "input_norm": True}
    model = mllm.assemble(encoder, lm, connector, device="cpu")
    randomized(model.connector, seed=1)
    return model


def with_tokens(model: Model, names: list[str]) -> tuple[Any, int]:
    """Return a copy of the tokenizer with further tokens, and the id of the first."""
    import copy

    tokenizer = copy.deepcopy(model.lm.tokenizer)
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=True) for name in names], special_tokens=True)
    return tokenizer, int(tokenizer.convert_tokens_to_ids(names[0]))


def fill(stock: Any, model: Model) -> None:
    """Give a class of `transformers` the model's weights."""
    stock.model.vision_tower.load_state_dict(AutoModel.from_pretrained(model.spec.encoder.model).state_dict())
    stock.resize_token_embeddings(model.lm.model.config.vocab_size)
    stock.model.language_model.load_state_dict(model.lm.model.model.state_dict())
    stock.lm_head.load_state_dict(model.lm.model.lm_head.state_dict())
    projector = stock.model.multi_modal_projector
    layers = [layer for layer in model.connector.body if isinstance(layer, torch.nn.Linear)]
    projector.linear_1.load_state_dict(layers[0].state_dict())
    projector.linear_2.load_state_dict(model.connector.project.state_dict())


@pytest.fixture(scope="module")
def llava_next(anyres: Any) -> tuple[Any, Any]:
    tokenizer, image = with_tokens(anyres, ["<image>"])
    text = anyres.lm.model.config.to_dict()
    config = LlavaNextConfig(
        vision_config=anyres.encoder.whole().config,
        text_config={**text, "vocab_size": len(tokenizer)},
        image_token_index=image,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    stock = LlavaNextForConditionalGeneration(config).eval()
    fill(stock, anyres)
    stock.resize_token_embeddings(len(tokenizer))
    stock.model.image_newline.data.copy_(anyres.connector.newline)
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
    )
    return stock, LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


@pytest.fixture(scope="module")
def internvl(dynamic: Any) -> Any:
    config = InternVLConfig(
        vision_config=dynamic.encoder.whole().config,
        text_config={**dynamic.lm.model.config.to_dict(), "vocab_size": dynamic.lm.model.config.vocab_size + 1},
        image_token_id=dynamic.lm.model.config.vocab_size,
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
        vision_feature_layer=-1,
    )
    stock = InternVLForConditionalGeneration(config).eval()
    fill(stock, dynamic)
    stock.resize_token_embeddings(config.image_token_id + 1)
    (norm,) = [layer for layer in dynamic.connector.body if isinstance(layer, torch.nn.LayerNorm)]
    stock.model.multi_modal_projector.layer_norm.load_state_dict(norm.state_dict())
    return stock


def ours(model: Model, pieces: list[Any], image: int) -> tuple[list[int], torch.Tensor]:
    """Return the ids of a prompt, with one for each visual token, and its logits."""
    encoded = model.encode(pieces)
    ids = [image if visual else token for token, visual in zip(encoded.ids, encoded.visual, strict=True)]
    embeds, batch = model.prepare([pieces])
    return ids, model.lm.logits(embeds, batch.mask)[0]


@torch.no_grad()
@pytest.mark.parametrize("number", range(len(IMAGES)))
def test_any_resolution_is_that_of_llava_next(anyres: Any, llava_next: Any, number: int) -> None:
    stock, processor = llava_next
    images = [IMAGES[number], IMAGES[0]]
    inputs = processor(images=images, text="See <image> and <image>. It is", return_tensors="pt")
    ids, logits = ours(anyres, ["See ", images[0], " and ", images[1], ". It is"], processor.image_token_id)
    assert ids == inputs["input_ids"][0].tolist()
    tiles = [anyres.encoder.preprocess(anyres.encoder.tiles(image)) for image in images]
    for own, theirs in zip(tiles, inputs["pixel_values"], strict=True):
        torch.testing.assert_close(own, theirs[: len(own)], rtol=0, atol=1e-6)
        assert not theirs[len(own) :].any()  # padding, up to the most tiles of the batch
    torch.testing.assert_close(logits, stock(**inputs).logits[0, :, : logits.shape[1]], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("number", range(len(IMAGES)))
def test_dynamic_resolution_is_that_of_internvl(dynamic: Any, internvl: Any, number: int) -> None:
    images = [IMAGES[number], IMAGES[0]]
    processor = GotOcr2ImageProcessorPil.from_pretrained(
        dynamic.spec.encoder.model, crop_to_patches=True, min_patches=1, max_patches=6
    )
    inputs = processor(images=images, return_tensors="pt")
    pixels = torch.cat([dynamic.encoder.preprocess(dynamic.encoder.tiles(image)) for image in images])
    torch.testing.assert_close(pixels, inputs["pixel_values"], rtol=0, atol=1e-6)
    token = internvl.config.image_token_id
    ids, logits = ours(dynamic, [images[0], "a ", images[1], "b"], token)
    first, second = (4 * int(number) for number in inputs["num_patches"])  # as InternVLProcessor counts them
    assert ids == [token] * first + dynamic.lm.tokenize("a ") + [token] * second + dynamic.lm.tokenize("b")
    theirs = internvl(input_ids=torch.tensor([ids]), pixel_values=inputs["pixel_values"]).logits[0]
    torch.testing.assert_close(logits, theirs[:, : logits.shape[1]], rtol=1e-4, atol=1e-4)
