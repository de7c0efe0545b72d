"""Build the models that are timed: one of ours, and the same weights in `transformers`' LLaVA class."""

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

from mllm.assembling import assemble
from mllm.assembly import Assembly
from mllm.hub import embedded as parts

LM = "mllm/smollm2-135m"
IMAGE_TOKEN = "<reponame>"  # is in the vocabulary, and in no prompt


def llava(folder: Path, *, size: dict[str, Any] | None = None, lm: str = LM) -> tuple[Assembly, Any]:
    """Return our model and the alternative: ViT-B/16 at 224 px (196 visual tokens), a two-layer MLP, a language model.

    Args:
        folder: where the encoder, with random weights, is saved.
        size: fields of `CLIPVisionConfig` that override ViT-B/16's, for a smaller one.
        lm: an embedded model or a folder.
    """
    save_vision(folder, size)
    ours = assemble({"model": str(folder), "layer": -1}, {"model": lm, "dtype": "float32"}, {"type": "mlp"})
    return ours, llava_class(ours, folder, lm)


def save_vision(folder: Path, size: dict[str, Any] | None = None) -> str:
    """Save a CLIP encoder with random weights, ViT-B/16 at 224 px except for ``size``, and return its folder."""
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
    """Return `transformers`' LLaVA class with our model's weights, tensor by tensor.

    Args:
        ours: our model, with the encoder in ``folder``.
        folder: of the encoder.
        lm: an embedded model or a folder.
    """
    lm_folder = parts.locate(lm) if lm.startswith("mllm/") else lm
    config = LlavaConfig(
        vision_config=AutoConfig.from_pretrained(folder, trust_remote_code=False),
        text_config=AutoConfig.from_pretrained(lm_folder, trust_remote_code=False),
        image_token_index=image_token(ours),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
    )
    stock = LlavaForConditionalGeneration(config).eval()
    tower = CLIPVisionModel.from_pretrained(folder, trust_remote_code=False)
    stock.model.vision_tower.load_state_dict(tower.state_dict())
    language = AutoModelForCausalLM.from_pretrained(lm_folder, dtype=torch.float32, trust_remote_code=False)
    stock.model.language_model.load_state_dict(language.model.state_dict())
    stock.lm_head.load_state_dict(language.lm_head.state_dict())
    layers = [module for module in ours.connector.modules() if isinstance(module, torch.nn.Linear)]
    projector = stock.model.multi_modal_projector
    for mine, theirs in zip(layers, (projector.linear_1, projector.linear_2), strict=True):
        theirs.load_state_dict(mine.state_dict())
    return stock.to(ours.device)


def image_token(model: Assembly) -> int:
    """Return the id of a visual token in the alternative's prompts."""
    token = model.lm.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return int(token) if token is not None else int(model.lm.pad)


def noise_images(count: int, *, side: int = 224) -> list[Image.Image]:
    """Return images of noise: the time does not depend on what images show."""
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]
