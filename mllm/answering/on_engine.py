"""Start a model's engine, with the model's LoRA if it has one."""

from __future__ import annotations

from typing import Any

from mllm.answering.decode import make_decoding
from mllm.capabilities import PeftAdapter
from mllm.config.parts import KINDS
from mllm.engines.peft_files import peft_folder
from mllm.model import Model


def start(model: Model) -> None:
    """Start the engine of a model whose trained weights are loaded, with the model's LoRA if it has one.

    Raises:
        MLLMError: it cannot be started, has another language model, or lacks an option of the recipe's decoding.
    """
    for kind in (None, *KINDS):
        make_decoding(model, {"kind": kind})  # which refuses the recipe's options that the engine does not have
    lora: dict[str, Any] = {}
    for adapter in model.find_all(PeftAdapter).values():
        config = adapter.peft_config
        lora = {"lora": peft_folder(adapter, model.spec.lm.model), "rank": int(config.r)}
        lora["targets"] = tuple(sorted(config.target_modules))
    model.lm.open(**lora)
