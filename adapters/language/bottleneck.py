"""Add bottleneck adapters (arXiv:1902.00751) to a decoder's layers, as in MAGMA (arXiv:2112.05253)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from mllm.errors import MLLMError
from mllm.lms.adapting import Switchable, decoder_layers
from mllm.registry import Count, NonNegative

# The names that decoders give to the two sublayers. In OPT and BART the mlp is the modules from fc1 to fc2.
NAMES = {
    "mlp": ("mlp", "ffn", "feed_forward", "block_sparse_moe", "fc1 fc2"),
    "attention": ("self_attn", "attn", "attention", "self_attention"),
}


class Bottleneck(Switchable):
    """Add ``x + s * up(relu(down(x)))`` after sublayers of every layer of a language model.

    Args:
        model: a language model of `transformers`; it gets hooks, and its modules do not change.
        after: ``mlp``, ``attention``, or both.
        reduction: the hidden size divided by the bottleneck's width.
        mode: the adapter's input: ``serial``, the sublayer's output; ``parallel``, the sublayer's input.
        scale: s; ``learned``: a trained number of each adapter, at first 1 (MAGMA's ``scaled_parallel``).
        std: of the initial weights, so small that the model starts almost unchanged.

    Raises:
        MLLMError: the layers have no such sublayer.
    """

    def __init__(
        self,
        model: Any,
        *,
        after: list[Literal["mlp", "attention"]] | None = None,
        reduction: Count = 4,
        mode: Literal["serial", "parallel"] = "serial",
        scale: float | Literal["learned"] = 1.0,
        std: NonNegative = 1e-3,
    ) -> None:
        super().__init__()
        if mode not in ("serial", "parallel"):
            raise MLLMError(f"adapters: mode is {mode!r}; expected 'serial' or 'parallel'. Set one of them.")
        if isinstance(scale, str) and scale != "learned":
            raise MLLMError(f"adapters: scale is {scale!r}; expected a number, or 'learned'. Set one of them.")
        self.mode = mode
        dim = int(model.config.get_text_config().hidden_size)
        weight = model.get_input_embeddings().weight
        self.layers = nn.ModuleList()
        self.scales = nn.ParameterList()  # of the learned ones
        for layer in decoder_layers(model):
            for sublayer in after or ["mlp"]:
                adapter = _bottleneck(dim, max(1, dim // reduction), std).to(weight.device)
                self.layers.append(adapter)
                factor: Any = scale
                if scale == "learned":
                    factor = nn.Parameter(torch.ones(1, device=weight.device))
                    self.scales.append(factor)
                self._hook(adapter, factor, *_find(layer, sublayer))

    def _hook(self, adapter: nn.Sequential, scale: Any, first: nn.Module, last: nn.Module) -> None:
        """Hook an adapter onto a sublayer, from its first to its last module (mostly the same module)."""
        inputs: list[Tensor] = []

        def store_input(module: nn.Module, args: Any, kwargs: Any) -> None:
            inputs[:] = [args[0] if args else kwargs["hidden_states"]]

        def add(module: nn.Module, args: Any, output: Any) -> Any:
            if not self.on:
                return output
            hidden: Tensor = output[0] if isinstance(output, tuple) else output
            x = hidden if self.mode == "serial" else inputs.pop()
            adapted = hidden + (scale * adapter(x.to(next(adapter.parameters()).dtype))).to(hidden.dtype)
            return (adapted, *output[1:]) if isinstance(output, tuple) else adapted

        if self.mode == "parallel":
            first.register_forward_pre_hook(store_input, with_kwargs=True)
        last.register_forward_hook(add)


def _bottleneck(dim: int, width: int, std: float) -> nn.Sequential:
    adapter = nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, dim))
    for name, parameter in adapter.named_parameters():
        nn.init.normal_(parameter, std=std) if name.endswith("weight") else nn.init.zeros_(parameter)
    return adapter


def _find(layer: nn.Module, sublayer: str) -> tuple[nn.Module, nn.Module]:
    """Return the first and the last module of a sublayer."""
    if sublayer not in NAMES:
        raise MLLMError(f"adapters: after names {sublayer!r}; expected {' or '.join(NAMES)}. Set one of them.")
    for names in NAMES[sublayer]:
        first, _, last = names.partition(" ")
        if hasattr(layer, first):
            return getattr(layer, first), getattr(layer, last or first)
    raise MLLMError(
        f"adapters: a layer of this language model has no {sublayer} with a known name ({', '.join(NAMES[sublayer])}). "
        "Use another adapter, such as lora."
    )
