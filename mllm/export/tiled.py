"""Convert models that cut images into tiles to the classes of LLaVA-NeXT, LLaVA-OneVision and InternVL."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionModel,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)

from mllm.encoders.base import sizes_of
from mllm.errors import MLLMError
from mllm.export.llava import checks, configuration, fill, hidden_state, projector
from mllm.export.processors import internvl_processor, next_processor, onevision_processor, pinpoints
from mllm.export.stock import (
    VIDEO,
    StockModel,
    build_stock,
    each,
    finished,
    merged_lm,
    with_image_token,
)
from mllm.media.tilings import AnyResolution, DynamicResolution
from mllm.model import Model

SEVERAL = (
    "This class cuts the image of a conversation into tiles where it is the only one. Of several images it encodes "
    "each as a whole, and this model cuts them: their answers differ. Only conversations with one image were compared."
)


def llava_next(model: Model) -> StockModel:
    """Return `LlavaNextForConditionalGeneration` with a model's weights: any resolution, two linear layers, a decoder.

    Raises:
        MLLMError: the model is not equivalent to that class; the message has all reasons.
    """
    tiling, layers, (tower, layer, strategy), *_, template = each(
        lambda: _rows_of_tiles(model, reduced=False),
        lambda: projector(model),
        lambda: _tower(model),
        *checks(model),
    )
    lm = merged_lm(model)
    (image,), tokenizer = with_image_token(model)
    patch = int(tower.config.patch_size)
    processor = next_processor(model, tiling, tokenizer, template, patch=patch, strategy=strategy)
    config = LlavaNextConfig(
        **configuration(model, lm, tower, layer, strategy, layers),
        image_token_index=image,
        image_seq_length=model.connector.num_tokens,
        image_grid_pinpoints=pinpoints(tiling),
    )
    stock = build_stock(lambda: LlavaNextForConditionalGeneration(config))
    fill(stock, tower, lm, layers)
    _add_newline(stock, model)
    return finished(stock, model, [image], processor)


def llava_onevision(model: Model) -> StockModel:
    """Return `LlavaOnevisionForConditionalGeneration` with a model's weights: LLaVA-NeXT with reduced grids.

    Raises:
        MLLMError: the model is not equivalent to that class; the message has all reasons.
    """
    tiling, layers, (tower, layer, strategy), *_, template = each(
        lambda: _rows_of_tiles(model, reduced=True),
        lambda: projector(model),
        lambda: _tower(model),
        *checks(model),
    )
    lm = merged_lm(model)
    (image, video), tokenizer = with_image_token(model, VIDEO)
    processor = onevision_processor(model, tiling, tokenizer, template, strategy=strategy)
    config = LlavaOnevisionConfig(
        **configuration(model, lm, tower, layer, strategy, layers),
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=pinpoints(tiling),
        vision_aspect_ratio=processor.vision_aspect_ratio,
    )
    stock = build_stock(lambda: LlavaOnevisionForConditionalGeneration(config))
    fill(stock, tower, lm, layers)
    _add_newline(stock, model)
    return finished(stock, model, [image, video], processor, several=SEVERAL)


def internvl(model: Model) -> StockModel:
    """Return `InternVLForConditionalGeneration` with a model's weights: dynamic tiles, a pixel shuffle, a decoder.

    Raises:
        MLLMError: the model is not equivalent to that class; the message has all reasons.
    """
    tiling, layers, (tower, layer, strategy), *_, template = each(
        lambda: _dynamic_tiles(model),
        lambda: projector(model, shuffled=True),
        lambda: _internvit(model),
        *checks(model),
    )
    lm = merged_lm(model)
    (image, video), tokenizer = with_image_token(model, VIDEO)
    processor = internvl_processor(model, tiling, tokenizer, template)
    config = InternVLConfig(
        **configuration(model, lm, tower, layer, strategy, layers),
        image_token_id=image,
        image_seq_length=model.connector.num_tokens,
        downsample_ratio=1 / layers.shuffle,
    )
    stock = build_stock(lambda: InternVLForConditionalGeneration(config))
    fill(stock, tower, lm, layers)
    return finished(stock, model, [image, video], processor)


def _add_newline(stock: Any, model: Model) -> None:
    stock.model.image_newline = nn.Parameter(model.connector.newline.detach(), requires_grad=False)


def _rows_of_tiles(model: Model, *, reduced: bool) -> AnyResolution:
    """Return how images are cut, in rows whose visual tokens are reduced to a limit or not."""
    tiling = model.tiling
    if not isinstance(tiling, AnyResolution) or not tiling.unpad:
        raise MLLMError(
            f"{_how(model)}; this class cuts them at any resolution and in rows without padding: "
            "encoder.tiles.kind=anyres with unpad."
        )
    if reduced != (tiling.limit is not None):
        raise MLLMError(
            "The grid's tokens are never reduced, and in this class they are (encoder.tiles.limit): export to "
            "hf-llava-next."
            if reduced
            else f"The grid's tokens are reduced to those of {tiling.limit} tiles (encoder.tiles.limit), and in this "
            "class never: export to hf-llava-onevision."
        )
    return tiling


def _dynamic_tiles(model: Model) -> DynamicResolution:
    """Return how images are cut, which is at dynamic resolution."""
    if not isinstance(model.tiling, DynamicResolution):
        raise MLLMError(f"{_how(model)}; this class cuts them at dynamic resolution: encoder.tiles.kind=dynamic.")
    return model.tiling


def _internvit(model: Model) -> tuple[Any, int, str]:
    """Return InternVL's vision tower, as `hidden_state` does; its class loads no other."""
    tower, layer, strategy = hidden_state(model, last=True)
    if not isinstance(tower, InternVLVisionModel):
        raise MLLMError(f"The encoder is {type(tower).__name__}; this class has InternVL's (InternVLVisionModel).")
    return tower, layer, strategy


def _how(model: Model) -> str:
    """Return how the encoder cuts images, as the beginning of a sentence."""
    tiles = model.spec.encoder.tiles
    if tiles is None:
        return "The encoder encodes images as a whole (encoder.tiles is not set)"
    padded = " with unpad=false" if getattr(tiles, "unpad", True) is False else ""
    return f"The encoder cuts images by encoder.tiles.kind={tiles.kind}{padded}"


def _tower(model: Model) -> tuple[Any, int, str]:
    """Return the vision tower, as `hidden_state` does.

    Raises:
        MLLMError: LLaVA's classes would compute another grid of patches than the encoder has.
    """
    tower, layer, strategy = hidden_state(model)
    side = model.encoder.size
    images, patches = (sizes_of(tower.config, name) for name in ("image_size", "patch_size"))
    if images != (side, side) or model.connector.token_grid != (side // patches[0], side // patches[1]):
        raise MLLMError(
            f"The tiles are {side} pixels wide and in the vision tower's configuration images are {images or 'unknown'}"
            ", from which this class computes the rows: leave out encoder.resolution, or take another encoder."
        )
    return tower, layer, strategy
