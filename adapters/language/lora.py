"""Low-rank adapters by peft: LoRA (arXiv:2106.09685) and DoRA (arXiv:2402.09353)."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from mllm.errors import MLLMError, near

OWN = ("lora_A", "lora_B", "lora_magnitude_vector", "lora_dropout")  # what peft adds to a linear map


class LoRA(nn.Module):
    """Add a low-rank product to linear maps of a language model.

    Args:
        model: a language model of `transformers`; peft puts its layers into it, the weights stay.
        r: rank.
        alpha: the product is scaled by ``alpha / r``.
        targets: names of the linear maps (``[q_proj, v_proj]``); ``all-linear``: all but the vocabulary's.
        dropout: before the product.
        dora: learn the weights' norms too (DoRA).

    Raises:
        MLLMError: no module of the language model has one of these names, or peft cannot adapt one of them.
    """

    def __init__(
        self,
        model: Any,
        *,
        r: int = 16,
        alpha: int = 16,
        targets: list[str] | str = "all-linear",
        dropout: float = 0.0,
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
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")  # peft sees to it
            try:
                inject_adapter_in_model(config, model)
            except ValueError as error:
                raise MLLMError(f"adapters: these targets do not fit, {targets!r}: {error}") from None
        # What peft put in, held here too: these modules are the adapter, whose tensors are trained and saved.
        self.layers = nn.ModuleDict()
        self._places: list[LoraLayer] = []
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                own = {part: getattr(module, part, None) for part in OWN}
                here = {part: value for part, value in own.items() if isinstance(value, nn.ModuleDict)}
                self.layers[name.replace(".", "/")] = nn.ModuleDict(here)
                self._places.append(module)
        self.layers.float()  # the language model may be in half precision; what trains is not

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Compute without the adapter."""
        for place in self._places:
            place.enable_adapters(False)
        try:
            yield
        finally:
            for place in self._places:
                place.enable_adapters(True)


def _check(model: nn.Module, targets: list[str]) -> None:
    known = {name.rpartition(".")[2] for name, module in model.named_modules() if not list(module.children())}
    for target in targets:
        if target.rpartition(".")[2] not in known:
            raise MLLMError(f"adapters: no module of the language model is called {target!r}. {near(target, known)}")
