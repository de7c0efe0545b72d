"""Map a model to an equivalent transformers class: shared checks and conversions.

Equivalence is tested numerically, not by class names: which hidden state the encoder returns, and whether a language
model's logits are one linear layer on its body's states. A model that is not equivalent is refused, with all reasons.

Weights are not copied: the transformers model is built without them, and its parameters are then those of the model.
Only what the export changes is new: layers with a merged LoRA, and the embeddings with a row for the image token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import init_empty_weights
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AddedToken, GenerationConfig, LlavaProcessor

from mllm.capabilities import SpeaksWords
from mllm.errors import MLLMError
from mllm.export.chat import chat_template
from mllm.export.images import image_processor
from mllm.model import Model

IMAGE, VIDEO = "<image>", "<video>"


@dataclass(frozen=True)
class StockModel:
    """A transformers model with this model's weights, and its processor; ``<image>`` is an image in its prompts.

    Attributes:
        several: how the class differs on conversations with several images, which are then not compared.
    """

    model: Any
    processor: Any
    several: str = ""


def each(*steps: Callable[[], Any]) -> list[Any]:
    """Return the results of all steps.

    Raises:
        MLLMError: a step raised one; the message lists those of all steps.
    """
    results, reasons = [], []
    for step in steps:
        try:
            results.append(step())
        except MLLMError as error:
            reasons.append(str(error))
    if reasons:
        raise MLLMError("\n".join(f"- {reason}" for reason in reasons))
    return results


def check_adapters(model: Model) -> None:
    """Raise an `MLLMError` where adapters or new tokens cannot be merged into the language model's weights."""
    if model.spec.tokens:
        raise MLLMError(
            f"The model has new tokens ({', '.join(model.spec.tokens)}), whose embeddings this class does not have."
        )
    for spec in model.spec.adapters:
        if spec.type != "lora":
            raise MLLMError(f"The adapter {spec.type!r} cannot be merged into the language model; lora can.")


def check_vocabulary(model: Model) -> None:
    """Raise an `MLLMError` where the connector's output is replaced by expected word embeddings."""
    if isinstance(model.connector, SpeaksWords) and model.connector.vocabulary.output == "words":
        raise MLLMError(
            "The connector returns expected word embeddings (connector.vocabulary), and no class of transformers has a "
            "softmax over words after its connector."
        )


def check_prompt(model: Model) -> str:
    """Return the chat template.

    Raises:
        MLLMError: no Jinja template formats conversations as this model does, or images stand before every prompt.
    """
    if any(example.image is not None for example in model.spec.prompt.examples):
        raise MLLMError(
            "The recipe's solved examples (prompt.examples) have images, and a processor of transformers has no images "
            "of its own. Export a model whose examples have words in an image's place, or that has none."
        )
    return chat_template(model, IMAGE)


def merged_lm(model: Model) -> Any:
    """Return the language model without adapters, which shares the weights that a LoRA does not change."""
    if not model.spec.adapters:
        return model.lm.model
    original = model.lm.model
    lm = copy.deepcopy(original, {id(tensor): tensor for tensor in (*original.parameters(), *original.buffers())})
    for name, module in list(lm.named_modules()):
        if isinstance(module, LoraLayer):
            layer = copy.deepcopy(module)
            layer.merge()
            lm.set_submodule(name, layer.get_base_layer())
    return lm


def check_whole_images(model: Model) -> None:
    """Raise an `MLLMError` where images are cut into tiles."""
    if model.tiling is not None:
        raise MLLMError(
            "The encoder cuts images into tiles (encoder.tiles); this class encodes each as a whole. Classes "
            "with tiles are hf-llava-next, hf-llava-onevision and hf-internvl."
        )


def whole_tower(model: Model) -> Any:
    """Return the vision tower with all its layers: the model's encoder may be truncated after the layer it uses."""
    encoder = model.spec.encoder
    if encoder.type != "transformers":
        raise MLLMError(f"The encoder is of type {encoder.type!r}; this class takes one of transformers.")
    return model.encoder.whole().float()


def causal_lm(model: Model) -> Any:
    """Return the language model.

    Raises:
        MLLMError: it is an encoder-decoder, or its embeddings and its body have different widths.
    """
    if getattr(model.lm.model.config, "is_encoder_decoder", False):
        raise MLLMError("The language model is an encoder-decoder; export writes decoders only.")
    if model.lm.dim != (inner := model.lm.model.config.hidden_size):
        raise MLLMError(
            f"The language model's embeddings are {model.lm.dim} wide, its body {inner}; this class has one width."
        )
    return model.lm.model


def text_config(model: Model, lm: Any) -> Any:
    """Return the language model's configuration, with the special tokens of its tokenizer and no path of its files."""
    config, tokenizer = copy.deepcopy(lm.config), model.lm.tokenizer
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, model.lm.eos
    config.pad_token_id = model.lm.pad
    config.tie_word_embeddings = lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    config._name_or_path = ""
    return config


def part_of(state: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    """Return a module's weight, and its bias if it has one, under another name."""
    return {f"{new}.{name}": state[f"{old}.{name}"] for name in ("weight", "bias") if f"{old}.{name}" in state}


def with_image_token(model: Model, *others: str) -> tuple[list[int], Any]:
    """Return the ids of the image token and of other new tokens, and a copy of the tokenizer with them."""
    tokenizer, new = copy.deepcopy(model.lm.tokenizer), [IMAGE, *others]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in new], special_tokens=True)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.lm.pad)
    return [int(tokenizer.convert_tokens_to_ids(token)) for token in new], tokenizer


def make_processor(model: Model, tokenizer: Any, template: str, *, patch: int, strategy: str) -> Any:
    """Return the processor: every ``<image>`` of a prompt becomes as many image tokens as an image has here.

    It is LLaVA's for every class: that of BLIP-2 has no chat template, and one image before everything else.

    Args:
        model: the model.
        tokenizer: with the image token.
        template: the chat template.
        patch: the side of the encoder's patches in pixels.
        strategy: LLaVA's ``vision_feature_select_strategy``.
    """
    patches = (model.encoder.size // patch) ** 2
    return LlavaProcessor(
        image_processor=image_processor(model),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=model.connector.num_tokens - patches + (strategy == "default"),
        image_token=IMAGE,
        chat_template=template,
    )


def build_stock(build: Callable[[], Any]) -> Any:
    """Return the built transformers model, without weights; a failure is an `MLLMError` with the reason."""
    try:
        with init_empty_weights():
            return build()
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise MLLMError(f"- The class cannot be built of these parts: {error}.") from None


def assign(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Let a module's parameters be these tensors, and its other buffers keep their values."""
    module.load_state_dict(state, assign=True)


def finished(stock: Any, model: Model, new: Sequence[int], processor: Any, several: str = "") -> StockModel:
    """Return the transformers model, with embeddings of new tokens, tied weights and a generation config."""
    if stock.config.get_text_config().tie_word_embeddings:
        stock.tie_weights()
    suppressed = _add_embeddings(stock, new)
    stops = model.lm.text.ends
    stock.generation_config = GenerationConfig(  # greedy decoding, which ends where this model ends
        do_sample=False,
        bos_token_id=model.lm.tokenizer.bos_token_id,
        eos_token_id=stops if len(stops) > 1 else stops[0],
        pad_token_id=model.lm.pad,
        suppress_tokens=suppressed,
    )
    return StockModel(stock.requires_grad_(False).eval(), processor, several)


def _add_embeddings(stock: Any, new: Sequence[int]) -> list[int]:
    """Extend the vocabulary for new tokens, with all-zero rows, and return the ids that are never generated."""
    rows = stock.get_input_embeddings().num_embeddings
    if (length := max(new) + 1) > rows:
        stock.resize_token_embeddings(length, mean_resizing=False)
        for table in (stock.get_input_embeddings(), stock.get_output_embeddings()):
            table.weight.data[rows:] = 0
            if getattr(table, "bias", None) is not None:
                table.bias.data[rows:] = 0
    return sorted({*new, *range(rows, length)})
