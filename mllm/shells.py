"""Which stock class of `transformers` an assembly equals, and that class with its weights.

Notable: equality is tried, not known by name. Which hidden state the encoder gives is found by comparing, and so is
whether a language model's logits are one linear map of its body's states. What is not exact is refused, all reasons
at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    AddedToken,
    AutoModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    Blip2VisionModel,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    ViTModel,
)

from mllm.errors import MLLMError
from mllm.model import Assembly

IMAGE = "<image>"


@dataclass(frozen=True)
class Shell:
    """A stock class with an assembly's weights, its processor, and the text that stands for an image in its prompts."""

    model: Any
    processor: Any
    image: str


def llava(model: Assembly) -> Shell:
    """Return `LlavaForConditionalGeneration` with an assembly's weights: a tower, two linear maps, a decoder.

    Raises:
        MLLMError: the assembly does not equal it; all reasons.
    """
    (first, second, act), (tower, layer, strategy), *_ = _each(
        lambda: _projector(model), lambda: _hidden_state(model), lambda: _adapters(model), lambda: _plain_head(model)
    )
    lm = _merged(model)
    ids, tokenizer = _with_image_token(model)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=lm.config,
        image_token_index=ids,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        projector_hidden_act=act,
        tie_word_embeddings=bool(getattr(lm.config, "tie_word_embeddings", False)),
    )
    stock = _made(lambda: LlavaForConditionalGeneration(config))
    stock.model.vision_tower.load_state_dict(tower.state_dict())
    stock.model.language_model.load_state_dict(lm.base_model.state_dict())
    stock.lm_head.load_state_dict(lm.get_output_embeddings().state_dict())
    stock.model.multi_modal_projector.linear_1.load_state_dict(first)
    stock.model.multi_modal_projector.linear_2.load_state_dict(second)
    _room(stock, ids)
    patch = int(tower.config.patch_size)
    processor = LlavaProcessor(
        image_processor=_image_processor(model),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=model.connector.num_tokens
        - (model.encoder.size // patch) ** 2
        + (strategy == "default"),
    )
    return Shell(_ready(stock, model, ids), processor, IMAGE)


def blip2(model: Assembly) -> Shell:
    """Return `Blip2ForConditionalGeneration` with an assembly's weights: its own ViT, a Q-Former, a decoder.

    Raises:
        MLLMError: the assembly does not equal it; all reasons.
    """
    qformer, (vision, tower), *_ = _each(
        lambda: _queries(model), lambda: _blip2_tower(model), lambda: _adapters(model), lambda: _causal(model)
    )
    lm, connector = _merged(model), model.connector
    ids, tokenizer = _with_image_token(model)
    config = Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=lm.config,
        num_query_tokens=connector.num_tokens,
        image_token_index=ids,
    )
    stock = _made(lambda: Blip2ForConditionalGeneration(config))
    stock.vision_model.load_state_dict(tower)
    stock.query_tokens.data.copy_(connector.queries.data)
    stock.qformer.load_state_dict(connector.qformer.state_dict())
    stock.language_projection.load_state_dict(connector.project.state_dict())
    stock.language_model.load_state_dict(lm.state_dict())
    _room(stock, ids)
    stock.config.text_config = stock.language_model.config
    # The processor can put the images in front of everything only. Elsewhere they stand in the text, token by token.
    front = not model.lm.bos and model.spec.prompt.template.startswith("{images}")
    processor = Blip2Processor(
        image_processor=_image_processor(model),
        tokenizer=tokenizer,
        num_query_tokens=connector.num_tokens if front else None,
    )
    return Shell(_ready(stock, model, ids), processor, "" if front else IMAGE * connector.num_tokens)


SHELLS: dict[str, Callable[[Assembly], Shell]] = {"hf-llava": llava, "hf-blip2": blip2}


def _each(*steps: Callable[[], Any]) -> list[Any]:
    """Return what each step returns; where any refuses, raise all their reasons."""
    found, reasons = [], []
    for step in steps:
        try:
            found.append(step())
        except MLLMError as error:
            reasons.append(str(error))
    if reasons:
        raise MLLMError("\n".join(f"- {reason}" for reason in reasons))
    return found


def _projector(model: Assembly) -> tuple[dict[str, Any], dict[str, Any], str]:
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


def _adapters(model: Assembly) -> None:
    """Refuse what cannot be merged into the language model's own weights."""
    if model.spec.tokens:
        raise MLLMError(
            f"The model has new tokens ({', '.join(model.spec.tokens)}), whose rows are no part of this class."
        )
    for spec in model.spec.adapters:
        if spec.type != "lora":
            raise MLLMError(f"The adapter {spec.type!r} cannot be merged into the language model; lora can.")
    if model.spec.lm.quantize is not None:
        raise MLLMError("The language model is quantised (lm.quantize): its weights are not those of the stock class.")


def _merged(model: Assembly) -> Any:
    """Return the language model without adapters: LoRA is added to the weights of a copy."""
    if not model.spec.adapters:
        return model.lm.model
    lm = copy.deepcopy(model.lm.model)
    for name, module in list(lm.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            lm.set_submodule(name, module.get_base_layer())
    return lm


def _whole_tower(model: Assembly) -> Any:
    """Return the tower with all its layers: the assembly's own may end where its features are taken."""
    encoder = model.spec.encoder
    if encoder.type != "transformers":
        raise MLLMError(f"The encoder is of type {encoder.type!r}; this class takes one of transformers.")
    return model.encoder.whole().float()


@torch.no_grad()
def _hidden_state(model: Assembly) -> tuple[Any, int, str]:
    """Return the tower, and which of its hidden states the encoder gives, the first token left out or not."""
    tower, layer = _whole_tower(model), model.spec.encoder.layer
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


def _causal(model: Assembly) -> Any:
    if getattr(model.lm.model.config, "is_encoder_decoder", False):
        raise MLLMError("The language model is an encoder-decoder; export writes decoders only.")
    if model.lm.dim != (inner := model.lm.model.config.hidden_size):
        raise MLLMError(
            f"The language model's embeddings are {model.lm.dim} wide, its body {inner}; this class has one width."
        )
    return model.lm.model


@torch.no_grad()
def _plain_head(model: Assembly) -> None:
    """Refuse a language model that is more than a body and one linear map, or that the class cannot embed for."""
    lm = _causal(model)
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


def _queries(model: Assembly) -> Any:
    """Return the Q-Former's configuration."""
    connector = model.connector
    if model.spec.connector.type != "qformer":
        raise MLLMError(f"The connector is {model.spec.connector.type!r}; this class has a qformer.")
    if connector.causal:
        raise MLLMError("The queries see only those before them (connector.causal); this class's see one another.")
    return Blip2QFormerConfig(**connector.qformer.config.to_diff_dict())


def _blip2_tower(model: Assembly) -> tuple[Blip2VisionConfig, dict[str, Any]]:
    """Return the configuration and weights of BLIP-2's ViT that gives what the Q-Former reads.

    Its last normalisation is the tower's own, or the one that the Q-Former starts with, behind a hidden state.
    """
    spec, tower = model.spec.encoder, _whole_tower(model)
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
        **_part(vit, "embeddings.patch_embeddings.projection", "embeddings.patch_embedding"),
        **_part(vit, "layernorm", "post_layernorm"),
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
            state |= _part(vit, f"{there}.{old}", f"{here}.{new}")
        maps = [_part(vit, f"{there}.attention.{which}_proj", "") for which in "qkv"]
        state |= {f"{here}.self_attn.qkv{name}": torch.cat([own[name] for own in maps]) for name in maps[0]}
    return state


def _part(state: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """Return a module's weight, and its bias where it has one, under another name."""
    return {f"{new}.{name}": state[f"{old}.{name}"] for name in ("weight", "bias") if f"{old}.{name}" in state}


def _with_image_token(model: Assembly) -> tuple[int, Any]:
    """Return the id that stands for a visual token, and the tokenizer that has it."""
    tokenizer = copy.deepcopy(model.lm.tokenizer)
    tokenizer.add_tokens([AddedToken(IMAGE, normalized=False, special=True)], special_tokens=True)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.lm.pad)
    return int(tokenizer.convert_tokens_to_ids(IMAGE)), tokenizer


def _image_processor(model: Assembly) -> Any:
    """Return the image processor as the encoder calls it: to the square, nothing cropped."""
    processor, side = copy.deepcopy(model.encoder.processor), model.encoder.size
    processor.size = {"height": side, "width": side}
    if hasattr(processor, "do_center_crop"):
        processor.do_center_crop = False
        processor.crop_size = {"height": side, "width": side}
    return processor


def _made(build: Callable[[], Any]) -> Any:
    """Build a stock class; what it cannot be built of is a reason."""
    try:
        return build()
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise MLLMError(f"- The class cannot be built of these parts: {error}.") from None


def _room(stock: Any, image: int) -> None:
    """Make the vocabulary wide enough for the image's token; its row is nought, and it is never generated."""
    embeddings = stock.get_input_embeddings()
    if image < embeddings.num_embeddings:
        return
    rows = embeddings.num_embeddings
    stock.resize_token_embeddings(image + 1, mean_resizing=False)
    for table in (stock.get_input_embeddings(), stock.get_output_embeddings()):
        table.weight.data[rows:] = 0
        if getattr(table, "bias", None) is not None:
            table.bias.data[rows:] = 0


def _ready(stock: Any, model: Assembly, image: int) -> Any:
    """Return the stock model to be saved: in float32, and decoding as ours does."""
    stock.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=model.lm.eos, pad_token_id=model.lm.pad, suppress_tokens=[image]
    )
    return stock.float().eval()
