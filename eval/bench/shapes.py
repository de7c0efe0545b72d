"""The models that are timed: one assembly of ours, and the same weights in `transformers`' own LLaVA class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from mllm.assembly import Assembly
from mllm.build import assemble
from mllm.hub import embedded as parts

LM = "mllm/smollm2-135m"
IMAGE_TOKEN = "<reponame>"  # in the vocabulary, and in none of the prompts


def llava(folder: Path, *, size: dict[str, Any] | None = None, lm: str = LM) -> tuple[Assembly, Any]:
    """Return ours and the alternative: ViT-B/16 at 224 px (196 visual tokens), a two-layer MLP, a language model.

    Args:
        folder: where the encoder, with random weights, is saved and loaded from.
        size: fields of `CLIPVisionConfig` over ViT-B/16's, for a smaller one.
        lm: a part or a folder.
    """
    save_vision(folder, size)
    ours = assemble({"model": str(folder), "layer": -1}, {"model": lm, "dtype": "float32"}, {"type": "mlp"})
    return ours, llava_class(ours, folder, lm)


def save_vision(folder: Path, size: dict[str, Any] | None = None) -> str:
    """Save a CLIP encoder with random weights, ViT-B/16 at 224 px but for ``size``, and return its folder."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    }
    shape |= {"image_size": 224, "patch_size": 16} | (size or {})
    vision = CLIPVisionConfig(**shape)
    side = {"height": int(vision.to_dict()["image_size"]), "width": int(vision.to_dict()["image_size"])}
    CLIPVisionModel(vision).save_pretrained(folder)
    CLIPImageProcessorPil(size=side, crop_size=side).save_pretrained(folder)
    return str(folder)


def llava_class(ours: Assembly, folder: Path, lm: str) -> Any:
    """Return `transformers`' LLaVA class with an assembly's weights, tensor by tensor.

    Args:
        ours: whose encoder is the one saved in ``folder``.
        folder: of the encoder.
        lm: a part or a folder.
    """
    place = parts.locate(lm) if lm.startswith("mllm/") else lm
    config = LlavaConfig(
        vision_config=AutoConfig.from_pretrained(folder),
        text_config=AutoConfig.from_pretrained(place),
        image_token_index=image_token(ours),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
    )
    stock = LlavaForConditionalGeneration(config).eval()
    tower = CLIPVisionModel.from_pretrained(folder)
    stock.model.vision_tower.load_state_dict(tower.state_dict())
    bare = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    stock.model.language_model.load_state_dict(bare.model.state_dict())
    stock.lm_head.load_state_dict(bare.lm_head.state_dict())
    ours_maps = [module for module in ours.connector.modules() if isinstance(module, torch.nn.Linear)]
    projector = stock.model.multi_modal_projector
    for mine, theirs in zip(ours_maps, (projector.linear_1, projector.linear_2), strict=True):
        theirs.load_state_dict(mine.state_dict())
    return stock


def image_token(model: Assembly) -> int:
    """Return the id that stands for a visual token in the alternative's prompts."""
    found = model.lm.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return int(found) if found is not None else int(model.lm.pad)


def pictures(count: int, *, side: int = 224) -> list[Image.Image]:
    """Return pictures of noise: what they show costs nothing and saves nothing."""
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]
