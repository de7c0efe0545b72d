"""Map a model to an equivalent transformers class: shared checks and conversions.

Equivalence is tested numerically, not by class names: which hidden state the encoder returns, and whether a language
model's logits are one linear layer on its body's states. A model that is not equivalent is refused, with all reasons.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer
from transformers import (
    AddedToken,
    GenerationConfig,
)

from mllm.errors import MLLMError
from mllm.model import Model

IMAGE = "<image>"


@dataclass(frozen=True)
class StockModel:
    """A transformers model with this model's weights, its processor, and the text for an image in its prompts."""

    model: Any
    processor: Any
    image: str


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
    if model.spec.lm.quantize is not None:
        raise MLLMError(
            "The language model is quantized (lm.quantize): its weights are not those of the transformers class."
        )


def merged_lm(model: Model) -> Any:
    """Return the language model without adapters: LoRA is merged into the weights of a copy."""
    if not model.spec.adapters:
        return model.lm.model
    lm = copy.deepcopy(model.lm.model)
    for name, module in list(lm.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            lm.set_submodule(name, module.get_base_layer())
    return lm


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


def part_of(state: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """Return a module's weight, and its bias if it has one, under another name."""
    return {f"{new}.{name}": state[f"{old}.{name}"] for name in ("weight", "bias") if f"{old}.{name}" in state}


def with_image_token(model: Model) -> tuple[int, Any]:
    """Return the id of the image token, and a copy of the tokenizer with that token added."""
    tokenizer = copy.deepcopy(model.lm.tokenizer)
    tokenizer.add_tokens([AddedToken(IMAGE, normalized=False, special=True)], special_tokens=True)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.lm.pad)
    return int(tokenizer.convert_tokens_to_ids(IMAGE)), tokenizer


def image_processor(model: Model) -> Any:
    """Return the image processor with the encoder's settings: resized to a square, without cropping."""
    processor, side = copy.deepcopy(model.encoder.processor), model.encoder.size
    processor.size = {"height": side, "width": side}
    if hasattr(processor, "do_center_crop"):
        processor.do_center_crop = False
        processor.crop_size = {"height": side, "width": side}
    return processor


def build_stock(build: Callable[[], Any]) -> Any:
    """Return the built transformers model; a failure is an `MLLMError` with the reason."""
    try:
        return build()
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise MLLMError(f"- The class cannot be built of these parts: {error}.") from None


def add_image_embedding(stock: Any, image: int) -> None:
    """Extend the vocabulary for the image token, with all-zero rows; the token is never generated."""
    embeddings = stock.get_input_embeddings()
    if image < embeddings.num_embeddings:
        return
    rows = embeddings.num_embeddings
    stock.resize_token_embeddings(image + 1, mean_resizing=False)
    for table in (stock.get_input_embeddings(), stock.get_output_embeddings()):
        table.weight.data[rows:] = 0
        if getattr(table, "bias", None) is not None:
            table.bias.data[rows:] = 0


def for_saving(stock: Any, model: Model, image: int) -> Any:
    """Return the transformers model in float32, with a generation config for greedy decoding as here."""
    stock.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=model.lm.text.ends, pad_token_id=model.lm.pad, suppress_tokens=[image]
    )
    return stock.float().eval()
