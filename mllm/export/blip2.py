"""Convert a model to `Blip2ForConditionalGeneration`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    Blip2VisionModel,
    ViTModel,
)

from mllm.capabilities import ReadsQuestions
from mllm.errors import MLLMError
from mllm.export.stock import (
    StockModel,
    assign,
    build_stock,
    causal_lm,
    check_adapters,
    check_prompt,
    check_vocabulary,
    check_whole_images,
    each,
    finished,
    make_processor,
    merged_lm,
    part_of,
    text_config,
    whole_tower,
    with_image_token,
)
from mllm.model import Model


def blip2(model: Model) -> StockModel:
    """Return `Blip2ForConditionalGeneration` with a model's weights: a ViT, a Q-Former, a decoder.

    Raises:
        MLLMError: the model is not equivalent to that class; the message has all reasons.
    """
    qformer, (vision, tower), *_, template = each(
        lambda: _qformer_config(model),
        lambda: _blip2_tower(model),
        lambda: check_whole_images(model),
        lambda: check_adapters(model),
        lambda: check_vocabulary(model),
        lambda: causal_lm(model),
        lambda: check_prompt(model),
    )
    lm, connector = merged_lm(model), model.connector
    (image,), tokenizer = with_image_token(model)
    processor = make_processor(model, tokenizer, template, patch=int(vision.patch_size), strategy="full")
    text = text_config(model, lm)
    config = Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=text,
        num_query_tokens=connector.num_tokens,
        image_token_index=image,
    )
    config.tie_word_embeddings = text.tie_word_embeddings
    stock = build_stock(lambda: Blip2ForConditionalGeneration(config))
    assign(stock.vision_model, tower)
    stock.query_tokens = nn.Parameter(connector.queries.detach(), requires_grad=False)
    assign(stock.qformer, connector.qformer.state_dict())
    assign(stock.language_projection, connector.project.state_dict())
    assign(stock.language_model, lm.state_dict())
    return finished(stock, model, [image], processor)


def _qformer_config(model: Model) -> Any:
    """Return the Q-Former's configuration."""
    connector = model.connector
    if model.spec.connector.type != "qformer":
        raise MLLMError(f"The connector is {model.spec.connector.type!r}; this class has a qformer.")
    if isinstance(connector, ReadsQuestions):
        raise MLLMError("The Q-Former reads questions (connector.questions); in this class it reads images alone.")
    if connector.causal:
        raise MLLMError("The queries attend causally (connector.causal); in this class they all attend to one another.")
    return Blip2QFormerConfig(**connector.qformer.config.to_diff_dict())


def _blip2_tower(model: Model) -> tuple[Blip2VisionConfig, dict[str, Any]]:
    """Return the configuration and weights of BLIP-2's ViT whose output equals the Q-Former's input.

    Its last normalization is that of the tower, or, after a hidden state, the one at the Q-Former's input.
    """
    spec, tower = model.spec.encoder, whole_tower(model)
    norm = model.connector.norm_features if model.spec.connector.type == "qformer" else nn.Identity()
    if not isinstance(tower, Blip2VisionModel | ViTModel):
        raise MLLMError(f"The encoder is {type(tower).__name__}; this class has a ViT (ViT, or BLIP-2's).")
    if spec.select != "all":
        raise MLLMError(f"encoder.select is {spec.select!r}; this class reads every token: encoder.select=all.")
    config = tower.config
    tower_norm = isinstance(norm, nn.Identity)
    if tower_norm == (spec.layer is not None) or (not tower_norm and norm.eps != config.layer_norm_eps):
        raise MLLMError(
            "This class normalizes once: set connector.norm=false where encoder.layer is not set, "
            f"or encoder.layer with a tower whose layer_norm_eps ({config.layer_norm_eps:g}) is the connector's (1e-6)."
        )
    layers = config.num_hidden_layers
    depth = layers if spec.layer is None else range(layers + 1)[spec.layer]
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size", "hidden_act")
    values = {name: getattr(config, name) for name in (*names, "layer_norm_eps", "qkv_bias")}
    state = tower.state_dict() if isinstance(tower, Blip2VisionModel) else _renamed(tower.state_dict(), layers)
    if not tower_norm:
        state |= {f"post_layernorm.{name}": tensor for name, tensor in norm.state_dict().items()}
    removed = tuple(f"encoder.layers.{index}." for index in range(depth, layers))
    return Blip2VisionConfig(num_hidden_layers=depth, **values), {
        n: t for n, t in state.items() if not n.startswith(removed)
    }


def _renamed(vit: dict[str, Any], layers: int) -> dict[str, Any]:
    """Return a ViT's tensors under the names of BLIP-2's vision model, which joins queries, keys and values."""
    state = {
        "embeddings.class_embedding": vit["embeddings.cls_token"],
        "embeddings.position_embedding": vit["embeddings.position_embeddings"],
        **part_of(vit, "embeddings.patch_embeddings.projection", "embeddings.patch_embedding"),
        **part_of(vit, "layernorm", "post_layernorm"),
    }
    for layer in range(layers):
        there, here = f"layers.{layer}", f"encoder.layers.{layer}"
        for old, new in (
            ("attention.o_proj", "self_attn.projection"),
            ("layernorm_before", "layer_norm1"),
            ("layernorm_after", "layer_norm2"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        ):
            state |= part_of(vit, f"{there}.{old}", f"{here}.{new}")
        maps = [part_of(vit, f"{there}.attention.{which}_proj", "") for which in "qkv"]
        state |= {f"{here}.self_attn.qkv{name}": torch.cat([each_map[name] for each_map in maps]) for name in maps[0]}
    return state
