"""Write an assembly as `LlavaForConditionalGeneration`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

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
    ready,
    whole_tower,
    with_image_token,
)
from mllm.model import Model


def llava(model: Model) -> Shell:
    """Return `LlavaForConditionalGeneration` with an assembly's weights: a tower, two linear maps, a decoder.

    Raises:
        MLLMError: the assembly does not equal it; all reasons.
    """
    (first, second, act), (tower, layer, strategy), *_ = each(
        lambda: _projector(model),
        lambda: _hidden_state(model),
        lambda: check_adapters(model),
        lambda: _plain_head(model),
    )
    lm = merged_lm(model)
    ids, tokenizer = with_image_token(model)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=lm.config,
        image_token_index=ids,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        projector_hidden_act=act,
        tie_word_embeddings=bool(getattr(lm.config, "tie_word_embeddings", False)),
    )
    stock = made_stock(lambda: LlavaForConditionalGeneration(config))
    stock.model.vision_tower.load_state_dict(tower.state_dict())
    stock.model.language_model.load_state_dict(lm.base_model.state_dict())
    stock.lm_head.load_state_dict(lm.get_output_embeddings().state_dict())
    stock.model.multi_modal_projector.linear_1.load_state_dict(first)
    stock.model.multi_modal_projector.linear_2.load_state_dict(second)
    make_room(stock, ids)
    patch = int(tower.config.patch_size)
    processor = LlavaProcessor(
        image_processor=image_processor(model),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=model.connector.num_tokens
        - (model.encoder.size // patch) ** 2
        + (strategy == "default"),
    )
    return Shell(ready(stock, model, ids), processor, IMAGE)


def _projector(model: Model) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return the two linear maps as LLaVA has them, and what stands between."""
    kind, connector, dim = model.spec.connector.type, model.connector, model.lm.dim
    if kind not in ("linear", "mlp"):
        raise MLLMError(f"The connector is {kind!r}; this class has two linear maps: linear, or mlp of depth 2.")
    modules = [connector.body] if kind == "linear" else [*connector.body]
    if modules[0].shuffle is not None or modules[0].cells is not None:
        raise MLLMError("The connector reduces the patches first (connector.tokens or shuffle); this class does not.")
    if not isinstance(connector.norm, nn.Identity):
        raise MLLMError("The connector has a LayerNorm (connector.norm); this class has none.")
    last = connector.project.state_dict()
    if kind == "linear":
        if connector.expand != 1:
            raise MLLMError(f"The connector makes {connector.expand} tokens of one vector; this class makes one.")
        return last, {"weight": torch.eye(dim), "bias": torch.zeros(dim)}, "linear"
    if len(modules) != 3 or modules[1].out_features != dim:
        raise MLLMError("The connector's connector.depth is not 2, or connector.hidden is not the embeddings' width.")
    return modules[1].state_dict(), last, "gelu"


@torch.no_grad()
def _hidden_state(model: Model) -> tuple[Any, int, str]:
    """Return the tower, and which of its hidden states the encoder gives, the first token left out or not."""
    tower, layer = whole_tower(model), model.spec.encoder.layer
    pixels = torch.rand(1, 3, model.encoder.size, model.encoder.size)
    features = model.encoder(pixels)
    try:
        blank = AutoModel.from_config(tower.config)
        assert type(blank) is type(tower)
        blank.load_state_dict(tower.state_dict())
        states = blank.float().eval()(pixels, output_hidden_states=True).hidden_states or ()
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise MLLMError(f"The encoder cannot be this class's tower: {error or type(tower).__name__}.") from None
    place = -1 if layer is None else layer
    if states and isinstance(getattr(tower.config, "patch_size", None), int):
        for strategy, seen in (("default", states[place][:, 1:]), ("full", states[place])):
            if torch.equal(seen, features):
                return tower, place, strategy
    raise MLLMError(
        "The encoder's features are not a hidden state of its tower, whole or without its first token (a map, a pooled "
        "vector, register tokens, or a last normalisation): set encoder.layer, or encoder.select=all."
    )


@torch.no_grad()
def _plain_head(model: Model) -> None:
    """Refuse a language model that is more than a body and one linear map, or that the class cannot embed for."""
    lm = causal_lm(model)
    head, body = lm.get_output_embeddings(), lm.base_model
    embeds = torch.randn(1, 4, model.lm.dim, generator=torch.Generator().manual_seed(0))
    plain = isinstance(head, nn.Linear) and head.bias is None and body is not lm
    if not plain or not torch.equal(head(body(inputs_embeds=embeds)[0]), lm(inputs_embeds=embeds).logits):
        raise MLLMError(
            f"{type(lm).__name__} does more than one linear map behind its body (a bias, a scale, soft-capping, "
            "another width); this class does not."
        )
    if not hasattr(body, "embed_tokens"):
        raise MLLMError(f"{type(body).__name__} has no embed_tokens, which this class looks words up in.")
    with torch.device("meta"):
        built = type(AutoModel.from_config(lm.config))
    if built is not type(body):
        raise MLLMError(f"This class would build another body than {type(body).__name__}.")
