"""Bottleneck adapters (arXiv:1902.00751), as MAGMA puts them into a decoder (arXiv:2112.05253)."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from mllm.errors import MLLMError
from mllm.lms.adapting import Switchable, decoder_layers

# What decoders call the two halves of a layer. In OPT and BART the mlp goes from one map to another.
NAMES = {
    "mlp": ("mlp", "ffn", "feed_forward", "block_sparse_moe", "fc1 fc2"),
    "attention": ("self_attn", "attn", "attention", "self_attention"),
}


class Bottleneck(Switchable):
    """Add ``x + s * up(relu(down(x)))`` behind halves of every layer of a language model.

    Args:
        model: a language model of `transformers`; it is hooked, not changed.
        after: ``mlp``, ``attention``, or both.
        reduction: the width inside is the hidden size over this.
        mode: what the adapter reads: ``serial``, the half's output; ``parallel``, its input.
        scale: s.
        std: of the weights at the start, so small that the model starts as it was.

    Raises:
        MLLMError: the layers have no such half.
    """

    def __init__(
        self,
        model: Any,
        *,
        after: list[Literal["mlp", "attention"]] | None = None,
        reduction: int = 4,
        mode: Literal["serial", "parallel"] = "serial",
        scale: float = 1.0,
        std: float = 1e-3,
    ) -> None:
        super().__init__()
        if mode not in ("serial", "parallel"):
            raise MLLMError(f"adapters: mode is {mode!r}; expected 'serial' or 'parallel'.")
        self.mode, self.scale = mode, scale
        dim = int(model.config.get_text_config().hidden_size)
        weight = model.get_input_embeddings().weight
        self.layers = nn.ModuleList()
        for layer in decoder_layers(model):
            for half in after or ["mlp"]:
                adapter = _new(dim, max(1, dim // reduction), std).to(weight.device)
                self.layers.append(adapter)
                self._put(adapter, *_find(layer, half))

    def _put(self, adapter: nn.Sequential, first: nn.Module, last: nn.Module) -> None:
        """Hook an adapter onto a half that goes from one module to another, mostly the same."""
        read: list[Tensor] = []

        def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
            read[:] = [args[0] if args else kwargs["hidden_states"]]

        def add(module: nn.Module, args: Any, output: Any) -> Any:
            if not self.on:
                return output
            made: Tensor = output[0] if isinstance(output, tuple) else output
            seen = made if self.mode == "serial" else read.pop()
            whole = made + self.scale * adapter(seen.to(next(adapter.parameters()).dtype)).to(made.dtype)
            return (whole, *output[1:]) if isinstance(output, tuple) else whole

        if self.mode == "parallel":
            first.register_forward_pre_hook(keep, with_kwargs=True)
        last.register_forward_hook(add)


def _new(dim: int, inner: int, std: float) -> nn.Sequential:
    adapter = nn.Sequential(nn.Linear(dim, inner), nn.ReLU(), nn.Linear(inner, dim))
    for name, parameter in adapter.named_parameters():
        nn.init.normal_(parameter, std=std) if name.endswith("weight") else nn.init.zeros_(parameter)
    return adapter


def _find(layer: nn.Module, half: str) -> tuple[nn.Module, nn.Module]:
    """Return the first and the last module of a half."""
    if half not in NAMES:
        raise MLLMError(f"adapters: after names {half!r}; expected {' or '.join(NAMES)}.")
    for names in NAMES[half]:
        first, _, last = names.partition(" ")
        if hasattr(layer, first):
            return getattr(layer, first), getattr(layer, last or first)
    raise MLLMError(f"adapters: a layer of this language model has no {half} among {', '.join(NAMES[half])}.")
