"""Define the keys of a recipe's language model: their types and defaults."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer

from mllm.config.base import Spec

DType = Literal["auto", "float32", "bfloat16", "float16"]


class QuantizeSpec(Spec):
    """How weights are quantized by bitsandbytes; ``8bit`` and ``4bit`` are short for a mapping."""

    kind: Literal["8bit", "4bit"]
    type: Literal["nf4", "fp4"] = "nf4"  # the numbers of 4 bits
    double: bool = True  # 4bit: the constants of blocks are quantized, too
    compute: DType = "auto"  # 4bit: the type of the products; auto: bfloat16 on a GPU that has it, else the inputs'


def lms_in(parts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the mappings of the language model of a recipe, of its stages, or of a saved model."""
    holders = (parts, *(parts.get("stages") or ()))
    yield from (lm for lm in (holder.get("lm") for holder in holders) if isinstance(lm, dict))


def add_quantization(parts: Mapping[str, Any]) -> None:
    """Set ``double`` of language models that were saved before there was this key: no constants were quantized."""
    for lm in lms_in(parts):
        if isinstance(lm.get("quantize"), str):
            lm["quantize"] = {"kind": lm["quantize"], "double": False}


class LMSpec(Spec):
    """The frozen language model."""

    type: str = "transformers"
    model: str = Field(min_length=1)
    dtype: DType = "auto"  # auto: as stored; while it trains float32, and while others train the type of the stages
    quantize: Annotated[
        QuantizeSpec | None, BeforeValidator(lambda value: {"kind": value} if isinstance(value, str) else value)
    ] = None
    init: Literal["pretrained", "random"] = "pretrained"
    trust_remote_code: bool = False  # run Python code from the model's repository
    attn_implementation: str | None = Field(default=None, min_length=1)  # as transformers names it; null: its choice

    @model_serializer(mode="wrap")
    def _without_none(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out an implementation that is not named: a run that was written before is resumed unchanged."""
        values: dict[str, Any] = write(self)
        return {key: value for key, value in values.items() if key != "attn_implementation" or value}

    def options(self) -> dict[str, Any]:
        """Return the arguments of the language model; permission to run its code only where it is given."""
        return self.model_dump(exclude={"type", *(() if self.trust_remote_code else ("trust_remote_code",))})
