"""Add low-rank adapters by peft: LoRA (arXiv:2106.09685) and DoRA (arXiv:2402.09353)."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from mllm.errors import MLLMError, near
from mllm.registry import Count, Dropout

PEFT_MODULES = ("lora_A", "lora_B", "lora_magnitude_vector", "lora_dropout")  # that peft adds to a linear layer


class LoRA(nn.Module):
    """Add low-rank updates to linear layers of a language model.

    Args:
        model: a language model of `transformers`; peft injects its layers into it, and the weights do not change.
        r: rank.
        alpha: the update is scaled by ``alpha / r``.
        targets: names of the linear layers (``[q_proj, v_proj]``); ``all-linear``: all but the output embedding; or a
            regular expression that matches whole paths.
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
        earlier = {name for layer in _lora_layers(model) for name in layer.lora_A}
        self._name = f"lora{len(earlier) + 1}" if earlier else "default"  # of several in one model
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "The following (rank|alpha)_pattern keys"
            )  # all-linear leaves experts out
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")  # peft corrects it itself
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # of an earlier LoRA
            try:
                inject_adapter_in_model(config, model, self._name)
            except ValueError as error:
                raise MLLMError(
                    f"adapters: peft cannot adapt the targets {targets!r}: {error}. Name linear layers of this model."
                ) from None
        # The modules that peft injected are registered here too: their tensors are trained and saved.
        self.layers = nn.ModuleDict()
        self._lora_layers = [layer for layer in _lora_layers(model) if self._name in layer.lora_A]
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer) and self._name in module.lora_A:
                injected = {part: getattr(module, part, None) for part in PEFT_MODULES}
                own = {
                    part: nn.ModuleDict({self._name: value[self._name]})
                    for part, value in injected.items()
                    if isinstance(value, nn.ModuleDict) and self._name in value
                }
                self.layers[name.replace(".", "/")] = nn.ModuleDict(own)
        for layer in _lora_layers(model):
            layer.set_adapter([*layer.lora_A])  # all of them: peft activates the last alone
        self.layers.float()  # the language model may be in half precision; the adapter is not
        names = sorted({name.rpartition("/")[2] for name in self.layers})
        self.peft_config = LoraConfig(
            r=r, lora_alpha=alpha, target_modules=names, use_dora=dora, task_type="CAUSAL_LM", inference_mode=True
        )

    def peft_tensors(self) -> dict[str, Tensor]:
        """Return the tensors on the CPU, by the names that they have in peft's files."""
        tensors = {}
        for name, tensor in self.layers.state_dict().items():
            layer, _, part = name.partition(".")
            part = part.replace(f".{self._name}.", ".").removesuffix(f".{self._name}")
            tensors[f"base_model.model.{layer.replace('/', '.')}.{part}"] = tensor.detach().cpu().contiguous()
        return tensors

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Compute without the adapter."""
        before = [list(layer.active_adapters) for layer in self._lora_layers]
        for layer, active in zip(self._lora_layers, before, strict=True):
            layer.set_adapter([name for name in active if name != self._name])
        try:
            yield
        finally:
            for layer, active in zip(self._lora_layers, before, strict=True):
                layer.set_adapter(active)


def _lora_layers(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _check(model: nn.Module, targets: list[str]) -> None:
    """Raise an `MLLMError` where no module of the language model has a target's name."""
    leaves = [name for name, module in model.named_modules() if not list(module.children())]
    known = {name.removesuffix(".base_layer").rpartition(".")[2] for name in leaves}  # as an earlier LoRA wraps it
    for target in targets:
        if target.rpartition(".")[2] not in known:
            raise MLLMError(f"adapters: no module of the language model is called {target!r}. {near(target, known)}")
