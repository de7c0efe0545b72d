"""Prepare a language model of `transformers`: quantize and freeze it, work around what slows or spoils its results."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn


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


def quantization(kind: str) -> Any:
    """Return the configuration of a quantization by bitsandbytes, ``8bit`` or ``4bit``."""
    from transformers import BitsAndBytesConfig

    # It appears in every pass of a float32 model: 8-bit layers cast their inputs.
    warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")
    return BitsAndBytesConfig(load_in_8bit=kind == "8bit", load_in_4bit=kind == "4bit", bnb_4bit_quant_type="nf4")
