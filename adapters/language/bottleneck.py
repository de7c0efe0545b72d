"""Bottleneck adapters (arXiv:1902.00751), as MAGMA puts them into a decoder (arXiv:2112.05253)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor, nn

from mllm.errors import MLLMError

# What decoders call the two halves of a layer. In OPT the last linear map is the end of what others call mlp.
NAMES = {
    "mlp": ("mlp", "ffn", "feed_forward", "fc2"),
    "attention": ("self_attn", "attn", "attention", "self_attention"),
}


class Bottleneck(nn.Module):
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
        self.mode, self.scale, self._on = mode, scale, True
        dim = int(model.config.get_text_config().hidden_size)
        weight = model.get_input_embeddings().weight
        self.layers = nn.ModuleList()
        for layer in decoder_layers(model):
            for half in after or ["mlp"]:
                adapter = _new(dim, max(1, dim // reduction), std).to(weight.device)
                self.layers.append(adapter)
                _find(layer, half).register_forward_hook(self._hook(adapter), with_kwargs=True)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Compute without the adapter."""
        self._on = False
        try:
            yield
        finally:
            self._on = True

    def _hook(self, adapter: nn.Sequential) -> Any:
        def add(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if not self._on:
                return output
            first: Tensor = output[0] if isinstance(output, tuple) else output
            given = args[0] if args else kwargs["hidden_states"]
            seen = first if self.mode == "serial" else given
            whole = first + self.scale * adapter(seen.to(next(adapter.parameters()).dtype)).to(first.dtype)
            return (whole, *output[1:]) if isinstance(output, tuple) else whole

        return add


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the layers of a decoder: the longest list of modules of one class."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(child) for child in m}) == 1]
    if not lists:
        raise MLLMError("adapters: this language model has no list of layers that an adapter could be put into.")
    return max(lists, key=len)


def _new(dim: int, inner: int, std: float) -> nn.Sequential:
    adapter = nn.Sequential(nn.Linear(dim, inner), nn.ReLU(), nn.Linear(inner, dim))
    for name, parameter in adapter.named_parameters():
        nn.init.normal_(parameter, std=std) if name.endswith("weight") else nn.init.zeros_(parameter)
    return adapter


def _find(layer: nn.Module, half: str) -> nn.Module:
    if half not in NAMES:
        raise MLLMError(f"adapters: after names {half!r}; expected {' or '.join(NAMES)}.")
    for name in NAMES[half]:
        if hasattr(layer, name):
            found: nn.Module = getattr(layer, name)
            return found
    raise MLLMError(f"adapters: a layer of this language model has no {half} among {', '.join(NAMES[half])}.")
