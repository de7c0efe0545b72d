"""Convert a model to `LlavaForConditionalGeneration`."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModel, LlavaConfig, LlavaForConditionalGeneration

from mllm.errors import MLLMError
from mllm.export.stock import (
    StockModel,
    assign,
    build_stock,
    causal_lm,
    check_adapters,
    check_prompt,
    check_vocabulary,
    each,
    finished,
    make_processor,
    merged_lm,
    text_config,
    whole_tower,
    with_image_token,
)
from mllm.model import Model


def llava(model: Model) -> StockModel:
    """Return `LlavaForConditionalGeneration` with a model's weights: a vision tower, two linear layers, a decoder.

    Raises:
        MLLMError: the model is not equivalent to that class; the message has all reasons.
    """
    (first, second, act), (tower, layer, strategy), *_, template = each(
        lambda: _projector(model),
        lambda: _hidden_state(model),
        lambda: check_adapters(model),
        lambda: check_vocabulary(model),
        lambda: _check_output_layer(model),
        lambda: check_prompt(model),
    )
    lm = merged_lm(model)
    image_id, tokenizer = with_image_token(model)
    processor = make_processor(model, tokenizer, template, patch=int(tower.config.patch_size), strategy=strategy)
    text = text_config(model, lm)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=image_id,
        image_seq_length=model.connector.num_tokens,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        projector_hidden_act=act,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    stock = build_stock(lambda: LlavaForConditionalGeneration(config))
    assign(stock.model.vision_tower, tower.state_dict())
    assign(stock.model.language_model, lm.base_model.state_dict())
    assign(stock.lm_head, lm.get_output_embeddings().state_dict())
    assign(stock.model.multi_modal_projector.linear_1, first)
    assign(stock.model.multi_modal_projector.linear_2, second)
    return finished(stock, model, image_id, processor)


def _projector(model: Model) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return the weights of LLaVA's two linear layers, and the activation between them."""
    kind, connector, dim = model.spec.connector.type, model.connector, model.lm.dim
    if kind not in ("linear", "mlp"):
        raise MLLMError(f"The connector is {kind!r}; this class has two linear layers: use linear, or mlp of depth 2.")
    modules = [connector.body] if kind == "linear" else [*connector.body]
    if modules[0].shuffle is not None or modules[0].cells is not None:
        raise MLLMError("The connector reduces the patches first (connector.tokens or shuffle); this class does not.")
    if not isinstance(connector.norm, nn.Identity):
        raise MLLMError("The connector has a LayerNorm (connector.norm); this class has none.")
    last = connector.project.state_dict()
    if kind == "linear":
        if connector.expand != 1:
            raise MLLMError(f"The connector makes {connector.expand} tokens per feature vector; this class makes one.")
        return last, {"weight": torch.eye(dim), "bias": torch.zeros(dim)}, "linear"
    if len(modules) != 3 or modules[1].out_features != dim:
        raise MLLMError(
            "The connector's depth (connector.depth) is not 2, or connector.hidden is not the embeddings' width."
        )
    return modules[1].state_dict(), last, "gelu"


@torch.no_grad()
def _hidden_state(model: Model) -> tuple[Any, int, str]:
    """Return the vision tower, the hidden state that the encoder returns, and whether without its first token."""
    tower, layer = whole_tower(model), model.spec.encoder.layer
    pixels = torch.rand(1, *model.encoder.shape)
    features = model.encoder(pixels)
    try:
        with init_empty_weights():
            blank = AutoModel.from_config(tower.config, trust_remote_code=False)
        assert type(blank) is type(tower)
        assign(blank, tower.state_dict())
        states = blank.eval()(pixels, output_hidden_states=True).hidden_states or ()
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise MLLMError(f"The encoder cannot be this class's vision tower: {error or type(tower).__name__}.") from None
    index = -1 if layer is None else layer
    if states and isinstance(getattr(tower.config, "patch_size", None), int):
        for strategy, candidate in (("default", states[index][:, 1:]), ("full", states[index])):
            if torch.equal(candidate, features):
                return tower, index, strategy
    raise MLLMError(
        "The encoder's features are not a hidden state of its tower, with or without the first token (they are a "
        "feature map, a pooled vector, without register tokens, or after a last normalization): set encoder.layer, or "
        "encoder.select=all."
    )


@torch.no_grad()
def _check_output_layer(model: Model) -> None:
    """Raise an `MLLMError` where the language model is not a body with embed_tokens and one linear layer."""
    lm = causal_lm(model)
    head, body = lm.get_output_embeddings(), lm.base_model
    embeds = torch.randn(1, 4, model.lm.dim, generator=torch.Generator().manual_seed(0))
    plain = isinstance(head, nn.Linear) and head.bias is None and body is not lm
    if not plain or not torch.equal(head(body(inputs_embeds=embeds)[0]), lm(inputs_embeds=embeds).logits):
        raise MLLMError(
            f"{type(lm).__name__} applies more than one linear layer to the states of its body (a bias, a scale, "
            "soft-capping, another width); this class does not."
        )
    if not hasattr(body, "embed_tokens"):
        raise MLLMError(f"{type(body).__name__} has no embed_tokens, which this class needs for the embeddings.")
    with torch.device("meta"):
        built = type(AutoModel.from_config(lm.config, trust_remote_code=False))
    if built is not type(body):
        raise MLLMError(f"This class would build another body than {type(body).__name__}: use another language model.")
