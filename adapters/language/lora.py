"""Add low-rank adapters by peft: LoRA (arXiv:2106.09685) and DoRA (arXiv:2402.09353)."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from mllm.errors import MLLMError, near
from mllm.registry import Count, Dropout

PEFT_MODULES = ("lora_A", "lora_B", "lora_magnitude_vector", "lora_dropout")  # that peft adds to a linear layer


class LoRA(nn.Module):
    """Add low-rank updates to linear layers of a language model.

    Args:
        model: a language model of `transformers`; peft injects its layers into it, and the weights do not change.
        r: rank.
        alpha: the update is scaled by ``alpha / r``.
        targets: names of the linear layers (``[q_proj, v_proj]``); ``all-linear``: all but the output embedding.
        dropout: on the input of the update.
        dora: also learn the magnitudes of the weights (DoRA).

    Raises:
        MLLMError: no module of the language model has one of these names, or peft cannot adapt one of them.
    """

    def __init__(
        self,
        model: Any,
        *,
        r: Count = 16,
        alpha: int = 16,
        targets: list[str] | str = "all-linear",
        dropout: Dropout = 0.0,
        dora: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(targets, str):
            _check(model, targets)
        config = LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, lora_dropout=dropout, use_dora=dora)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "The following (rank|alpha)_pattern keys"
            )  # all-linear leaves experts out
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")  # peft corrects it itself
            try:
                inject_adapter_in_model(config, model)
            except ValueError as error:
                raise MLLMError(
                    f"adapters: peft cannot adapt the targets {targets!r}: {error}. Name linear layers of this model."
                ) from None
        # The modules that peft injected are registered here too: their tensors are trained and saved.
        self.layers = nn.ModuleDict()
        self._lora_layers: list[LoraLayer] = []
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                injected = {part: getattr(module, part, None) for part in PEFT_MODULES}
                modules = {part: value for part, value in injected.items() if isinstance(value, nn.ModuleDict)}
                self.layers[name.replace(".", "/")] = nn.ModuleDict(modules)
                self._lora_layers.append(module)
        self.layers.float()  # the language model may be in half precision; the adapter is not

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Compute without the adapter."""
        for layer in self._lora_layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._lora_layers:
                layer.enable_adapters(True)


def _check(model: nn.Module, targets: list[str]) -> None:
    """Raise an `MLLMError` where no module of the language model has a target's name."""
    known = {name.rpartition(".")[2] for name, module in model.named_modules() if not list(module.children())}
    for target in targets:
        if target.rpartition(".")[2] not in known:
            raise MLLMError(f"adapters: no module of the language model is called {target!r}. {near(target, known)}")
