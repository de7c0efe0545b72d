"""The recipes that cut images: their sizes and tokens on the meta device are those that are published."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    SmolVLMImageProcessorPil,
)

from mllm.config import loading
from mllm.planning.paper import meta_model

SIZES = [(336, 336), (672, 672), (1344, 336), (336, 1344), (640, 480), (480, 640), (1000, 10), (50, 60), (3000, 2000)]


def model_of(name: str) -> Any:
    """Return the model of a recipe's last stage, without weights."""
    return meta_model(loading.load(name).stages[-1])


def weights(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def tokens(model: Any, size: tuple[int, int]) -> int:
    return int(model.connector.tokens_of(model.tiling.layout(size)))


def test_llava_next() -> None:
    """Counts are those of its processor with the published grids; the connector is that of its class."""
    model = model_of("llava-next")
    images = LlavaNextImageProcessorPil()  # whose grids are the published ones
    counting = LlavaNextProcessor.__new__(LlavaNextProcessor)
    counting.image_processor, counting.patch_size, counting.num_additional_image_tokens = images, 14, 0
    for width, height in SIZES:
        assert tokens(model, (width, height)) == counting._get_number_of_features(height, width, 336, 336)
    assert model.tokens_per_image == tokens(model, (672, 672)) == 576 + 48 * 49
    config = LlavaNextConfig(text_config={"model_type": "llama"})  # whose defaults are those of a 7B model
    with init_empty_weights():
        stock = LlavaNextForConditionalGeneration(config)
    assert weights(model.connector) == weights(stock.model.multi_modal_projector) + stock.model.image_newline.numel()
    assert weights(model.lm) == weights(stock.model.language_model) + weights(stock.lm_head) == 6_738_415_616


def test_internvl() -> None:
    """InternVL2.5-1B has 938,193,024 parameters; its language model has a separate output layer, and 151,674 tokens."""
    model = model_of("internvl")
    assert [tokens(model, size) for size in ((448, 448), (896, 448), (1, 1))] == [256, 3 * 256, 256]
    assert model.tokens_per_image == 13 * 256
    separate = weights(model.lm) - 151_936 * 896 + 2 * 151_674 * 896
    assert weights(model.encoder) + weights(model.connector) + separate == 938_193_024


def test_smolvlm() -> None:
    """SmolVLM-256M has 256,484,928 parameters; its output layer is separate, and has 128 more tokens, and no bias."""
    model = model_of("smolvlm")
    images = SmolVLMImageProcessorPil(size={"longest_edge": 2048}, max_image_size={"longest_edge": 512})
    for width, height in SIZES:
        assert tokens(model, (width, height)) == 64 * images.get_number_of_image_patches(height, width)[0]
    assert model.tokens_per_image == tokens(model, (100, 100)) == 17 * 64
    separate = weights(model.lm) + 128 * 576 + 49_280 * 576
    assert weights(model.encoder) + weights(model.connector) - 576 + separate == 256_484_928


@pytest.mark.installed
@pytest.mark.parametrize(("name", "count"), [("llava-next-cpu", 24), ("internvl-cpu", 20), ("smolvlm-cpu", 20)])
def test_variants_on_the_embedded_parts(name: str, count: int, need: Any) -> None:
    need("mllm/mobilenet-v2", "mllm/smollm2-135m")
    assert tokens(model_of(name), (224, 224)) == count
