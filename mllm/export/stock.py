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

from peft.tuners.lora import LoraLayer
from transformers import (
    AddedToken,
    GenerationConfig,
)

from mllm.errors import MLLMError
from mllm.model import Model

IMAGE = "<image>"


@dataclass(frozen=True)
class Shell:
    """A stock class with an assembly's weights, its processor, and the text that stands for an image in its prompts."""

    model: Any
    processor: Any
    image: str


def each(*steps: Callable[[], Any]) -> list[Any]:
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


def check_adapters(model: Model) -> None:
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


def merged_lm(model: Model) -> Any:
    """Return the language model without adapters: LoRA is added to the weights of a copy."""
    if not model.spec.adapters:
        return model.lm.model
    lm = copy.deepcopy(model.lm.model)
    for name, module in list(lm.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            lm.set_submodule(name, module.get_base_layer())
    return lm


def whole_tower(model: Model) -> Any:
    """Return the tower with all its layers: the assembly's own may end where its features are taken."""
    encoder = model.spec.encoder
    if encoder.type != "transformers":
        raise MLLMError(f"The encoder is of type {encoder.type!r}; this class takes one of transformers.")
    return model.encoder.whole().float()


def causal_lm(model: Model) -> Any:
    """Return the language model, or refuse one that is no decoder of one width."""
    if getattr(model.lm.model.config, "is_encoder_decoder", False):
        raise MLLMError("The language model is an encoder-decoder; export writes decoders only.")
    if model.lm.dim != (inner := model.lm.model.config.hidden_size):
        raise MLLMError(
            f"The language model's embeddings are {model.lm.dim} wide, its body {inner}; this class has one width."
        )
    return model.lm.model


def part_of(state: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """Return a module's weight, and its bias where it has one, under another name."""
    return {f"{new}.{name}": state[f"{old}.{name}"] for name in ("weight", "bias") if f"{old}.{name}" in state}


def with_image_token(model: Model) -> tuple[int, Any]:
    """Return the id that stands for a visual token, and the tokenizer that has it."""
    tokenizer = copy.deepcopy(model.lm.tokenizer)
    tokenizer.add_tokens([AddedToken(IMAGE, normalized=False, special=True)], special_tokens=True)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.lm.pad)
    return int(tokenizer.convert_tokens_to_ids(IMAGE)), tokenizer


def image_processor(model: Model) -> Any:
    """Return the image processor as the encoder calls it: to the square, nothing cropped."""
    processor, side = copy.deepcopy(model.encoder.processor), model.encoder.size
    processor.size = {"height": side, "width": side}
    if hasattr(processor, "do_center_crop"):
        processor.do_center_crop = False
        processor.crop_size = {"height": side, "width": side}
    return processor


def made_stock(build: Callable[[], Any]) -> Any:
    """Build a stock class; what it cannot be built of is a reason."""
    try:
        return build()
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise MLLMError(f"- The class cannot be built of these parts: {error}.") from None


def make_room(stock: Any, image: int) -> None:
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


def ready(stock: Any, model: Model, image: int) -> Any:
    """Return the stock model to be saved: in float32, and decoding as ours does."""
    stock.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=model.lm.eos, pad_token_id=model.lm.pad, suppress_tokens=[image]
    )
    return stock.float().eval()
