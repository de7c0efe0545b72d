"""Convert a model to `LlavaForConditionalGeneration`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModel, LlavaConfig, LlavaForConditionalGeneration

from mllm.encoders.base import sizes_of
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
    text_config,
    whole_tower,
    with_image_token,
)
from mllm.model import Model


@dataclass(frozen=True)
class Layers:
    """The layers between tower and decoder: a pixel shuffle, normalization, and two linear layers with an activation.

    Attributes:
        first: the weights of the first linear layer.
        second: those of the second.
        act: the activation between them.
        norm: the weights of the normalization, if there is one.
        shuffle: the side of the pixel shuffle; 1: there is none.
    """

    first: dict[str, Any]
    second: dict[str, Any]
    act: str
    norm: dict[str, Any] | None = None
    shuffle: int = 1


def llava(model: Model) -> StockModel:
    """Return `LlavaForConditionalGeneration` with a model's weights: a vision tower, two linear layers, a decoder.

    Raises:
        MLLMError: the model is not equivalent to that class; the message has all reasons.
    """
    layers, (tower, layer, strategy), *_, template = each(
        lambda: projector(model),
        lambda: hidden_state(model),
        lambda: check_whole_images(model),
        *checks(model),
    )
    lm = merged_lm(model)
    (image,), tokenizer = with_image_token(model)
    processor = make_processor(model, tokenizer, template, patch=int(tower.config.patch_size), strategy=strategy)
    config = LlavaConfig(
        **configuration(model, lm, tower, layer, strategy, layers),
        image_token_index=image,
        image_seq_length=model.connector.num_tokens,
    )
    stock = build_stock(lambda: LlavaForConditionalGeneration(config))
    fill(stock, tower, lm, layers)
    return finished(stock, model, [image], processor)


def checks(model: Model) -> list[Any]:
    """Return the checks of what all classes of LLaVA's build lack, of which the last returns the chat template."""
    return [
        lambda: check_adapters(model),
        lambda: check_vocabulary(model),
        lambda: check_output_layer(model),
        lambda: check_prompt(model),
    ]


def configuration(model: Model, lm: Any, tower: Any, layer: int, strategy: str, layers: Layers) -> dict[str, Any]:
    """Return the keys that the configurations of all classes of LLaVA's build have.

    Args:
        model: the model.
        lm: its language model, as the class holds it.
        tower: the vision tower.
        layer: of the tower, whose hidden states are the features.
        strategy: which of them are selected, by the name that `transformers` has for it.
        layers: between tower and language model.
    """
    text = text_config(model, lm)
    return {
        "vision_config": tower.config,
        "text_config": text,
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": strategy,
        "projector_hidden_act": layers.act,
        "tie_word_embeddings": text.tie_word_embeddings,
    }


def fill(stock: Any, tower: Any, lm: Any, layers: Layers) -> None:
    """Give a class of LLaVA's build the weights of a vision tower, a language model and the layers between them."""
    assign(stock.model.vision_tower, tower.state_dict())
    assign(stock.model.language_model, lm.base_model.state_dict())
    assign(stock.lm_head, lm.get_output_embeddings().state_dict())
    assign(stock.model.multi_modal_projector.linear_1, layers.first)
    assign(stock.model.multi_modal_projector.linear_2, layers.second)
    if layers.norm is not None:
        assign(stock.model.multi_modal_projector.layer_norm, layers.norm)


def projector(model: Model, *, shuffled: bool = False) -> Layers:
    """Return the layers of a connector that is linear or an mlp of depth 2.

    Args:
        model: the model.
        shuffled: whether the class has a pixel shuffle, and a normalization after it.

    Raises:
        MLLMError: the class has other layers.
    """
    kind, connector, dim = model.spec.connector.type, model.connector, model.lm.dim
    if kind not in ("linear", "mlp"):
        raise MLLMError(f"The connector is {kind!r}; this class has two linear layers: use linear, or mlp of depth 2.")
    reduce, *modules = [connector.body] if kind == "linear" else [*connector.body]
    if reduce.cells is not None or (reduce.shuffle is not None and not shuffled):
        raise MLLMError("The connector reduces the patches first (connector.tokens or shuffle); this class does not.")
    if not isinstance(connector.norm, nn.Identity):
        raise MLLMError("The connector has a LayerNorm (connector.norm); this class has none.")
    norm = modules.pop(0).state_dict() if modules and isinstance(modules[0], nn.LayerNorm) else None
    if shuffled != (norm is not None):
        raise MLLMError(
            "The connector has no LayerNorm before its first linear layer; this class has one: connector.type=mlp with "
            "input_norm."
            if shuffled
            else "The connector has a LayerNorm (connector.input_norm); this class has none."
        )
    last = connector.project.state_dict()
    if kind == "linear":
        if connector.expand != 1:
            raise MLLMError(f"The connector makes {connector.expand} tokens per feature vector; this class makes one.")
        return Layers(last, {"weight": torch.eye(dim), "bias": torch.zeros(dim)}, "linear")
    if len(modules) != 2 or modules[0].out_features != dim:
        raise MLLMError(
            "The connector's depth (connector.depth) is not 2, or connector.hidden is not the embeddings' width."
        )
    return Layers(modules[0].state_dict(), last, "gelu", norm, reduce.shuffle or 1)


@torch.no_grad()
def hidden_state(model: Model, *, last: bool = False) -> tuple[Any, int, str]:
    """Return the vision tower, the hidden state that the encoder returns, and whether without its first token.

    Args:
        model: the model.
        last: whether -1 is the tower's output in the class, and not the last hidden state.

    Raises:
        MLLMError: the encoder returns something else.
    """
    tower, layer = whole_tower(model), model.spec.encoder.layer
    pixels = torch.rand(1, *model.encoder.shape)
    features = model.encoder(pixels)
    try:
        with init_empty_weights():
            blank = AutoModel.from_config(tower.config, trust_remote_code=False)
        assert type(blank) is type(tower)
        assign(blank, tower.state_dict())
        output = blank.eval()(pixels, output_hidden_states=True)
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise MLLMError(f"The encoder cannot be this class's vision tower: {error or type(tower).__name__}.") from None
    index = -1 if layer is None else layer
    if (states := output.hidden_states or ()) and sizes_of(tower.config, "patch_size"):
        state = output.last_hidden_state if last and index == -1 else states[index]
        for strategy, candidate in (("default", state[:, 1:]), ("full", state)):
            if torch.equal(candidate, features):
                return tower, index, strategy
    raise MLLMError(
        "The encoder's features are not a hidden state of its tower, with or without the first token (they are a "
        "feature map, a pooled vector, without register tokens, or after a last normalization): set encoder.layer, or "
        "encoder.select=all."
    )


@torch.no_grad()
def check_output_layer(model: Model) -> None:
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
