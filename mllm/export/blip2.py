"""Write an assembly as `Blip2ForConditionalGeneration`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    Blip2VisionModel,
    ViTModel,
)

from mllm.errors import MLLMError
from mllm.export.stock import (
    IMAGE,
    Shell,
    causal_lm,
    check_adapters,
    each,
    image_processor,
    made_stock,
    make_room,
    merged_lm,
    part_of,
    ready,
    whole_tower,
    with_image_token,
)
from mllm.model import Model


def blip2(model: Model) -> Shell:
    """Return `Blip2ForConditionalGeneration` with an assembly's weights: its own ViT, a Q-Former, a decoder.

    Raises:
        MLLMError: the assembly does not equal it; all reasons.
    """
    qformer, (vision, tower), *_ = each(
        lambda: _queries(model),
        lambda: _blip2_tower(model),
        lambda: check_adapters(model),
        lambda: causal_lm(model),
    )
    lm, connector = merged_lm(model), model.connector
    ids, tokenizer = with_image_token(model)
    config = Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=lm.config,
        num_query_tokens=connector.num_tokens,
        image_token_index=ids,
    )
    stock = made_stock(lambda: Blip2ForConditionalGeneration(config))
    stock.vision_model.load_state_dict(tower)
    stock.query_tokens.data.copy_(connector.queries.data)
    stock.qformer.load_state_dict(connector.qformer.state_dict())
    stock.language_projection.load_state_dict(connector.project.state_dict())
    stock.language_model.load_state_dict(lm.state_dict())
    make_room(stock, ids)
    stock.config.text_config = stock.language_model.config
    # The processor can put the images in front of everything only. Elsewhere they stand in the text, token by token.
    front = not model.lm.bos and model.spec.prompt.template.startswith("{images}")
    processor = Blip2Processor(
        image_processor=image_processor(model),
        tokenizer=tokenizer,
        num_query_tokens=connector.num_tokens if front else None,
    )
    return Shell(ready(stock, model, ids), processor, "" if front else IMAGE * connector.num_tokens)


def _queries(model: Model) -> Any:
    """Return the Q-Former's configuration."""
    connector = model.connector
    if model.spec.connector.type != "qformer":
        raise MLLMError(f"The connector is {model.spec.connector.type!r}; this class has a qformer.")
    if connector.causal:
        raise MLLMError("The queries see only those before them (connector.causal); this class's see one another.")
    return Blip2QFormerConfig(**connector.qformer.config.to_diff_dict())


def _blip2_tower(model: Model) -> tuple[Blip2VisionConfig, dict[str, Any]]:
    """Return the configuration and weights of BLIP-2's ViT that gives what the Q-Former reads.

    Its last normalisation is the tower's own, or the one that the Q-Former starts with, behind a hidden state.
    """
    spec, tower = model.spec.encoder, whole_tower(model)
    norm = getattr(model.connector, "norm_features", nn.Identity())
    if not isinstance(tower, Blip2VisionModel | ViTModel):
        raise MLLMError(f"The encoder is {type(tower).__name__}; this class has a ViT of its own (ViT, BLIP-2's).")
    if spec.select != "all":
        raise MLLMError(f"encoder.select is {spec.select!r}; this class reads every token: encoder.select=all.")
    config = tower.config
    own = isinstance(norm, nn.Identity)
    if own == (spec.layer is not None) or (not own and norm.eps != config.layer_norm_eps):
        raise MLLMError(
            "This class normalises once: set connector.norm=false where encoder.layer is left out, "
            f"or encoder.layer with a tower whose layer_norm_eps ({config.layer_norm_eps:g}) is the connector's (1e-6)."
        )
    layers = config.num_hidden_layers
    depth = layers if spec.layer is None else range(layers + 1)[spec.layer]
    same = ("hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size", "hidden_act")
    values = {name: getattr(config, name) for name in (*same, "layer_norm_eps", "qkv_bias")}
    state = tower.state_dict() if isinstance(tower, Blip2VisionModel) else _renamed(tower.state_dict(), layers)
    if not own:
        state |= {f"post_layernorm.{name}": tensor for name, tensor in norm.state_dict().items()}
    gone = tuple(f"encoder.layers.{index}." for index in range(depth, layers))
    return Blip2VisionConfig(num_hidden_layers=depth, **values), {
        n: t for n, t in state.items() if not n.startswith(gone)
    }


def _renamed(vit: dict[str, Any], layers: int) -> dict[str, Any]:
    """Return a ViT's tensors as BLIP-2's vision model has them: the three maps of the attention are one there."""
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
        state |= {f"{here}.self_attn.qkv{name}": torch.cat([own[name] for own in maps]) for name in maps[0]}
    return state
