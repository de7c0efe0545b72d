"""Prepare a language model of `transformers`: quantize and freeze it, work around what slows or spoils its results."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mllm.config.lm import QuantizeSpec
from mllm.devices import computes_in_bfloat16


def frozen(model: Any) -> Any:
    """Freeze a language model, and work around what slows or spoils it."""
    model.requires_grad_(False).eval()
    if (head := model.get_output_embeddings()) is not None:
        head.register_forward_pre_hook(_make_contiguous)
    for module in model.modules():
        # bitsandbytes' fast 4-bit layout for CPUs, chosen at the first pass without a gradient, makes every later
        # gradient wrong, and lets results depend on earlier passes.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _make_contiguous(_: nn.Module, args: Any) -> Any:
    """Make the input of the output embeddings contiguous: with a slice torch copies the vocabulary for each row."""
    return (args[0].contiguous(), *args[1:])


def loading_options(
    dtype: str, quantize: Mapping[str, Any] | str | None, device: torch.device, attn_implementation: str | None
) -> dict[str, Any]:
    """Return the options of `from_pretrained`; the arguments are those of `mllm.lms.language_model.LanguageModel`."""
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if quantize is not None:
        # Without a map, transformers puts them on a GPU where there is one, whatever the rest of the model does.
        spec = QuantizeSpec.model_validate({"kind": quantize} if isinstance(quantize, str) else quantize)
        options |= {"quantization_config": _quantization(spec, device), "device_map": {"": device}}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    return options


def _quantization(spec: QuantizeSpec, device: torch.device) -> Any:
    """Return the configuration of bitsandbytes for a device."""
    from transformers import BitsAndBytesConfig

    # It appears in every pass of a float32 model: 8-bit layers cast their inputs.
    warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")
    if spec.kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = spec.compute
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.type,
        bnb_4bit_use_double_quant=spec.double,
        bnb_4bit_compute_dtype=(
            ("bfloat16" if computes_in_bfloat16(device) else None) if compute == "auto" else compute
        ),
    )
