"""Compile the language model's layers for the steps of a stage, and for nothing else.

Layers have the same code, so what the first one compiles serves all. Whatever else runs them (answers while training,
probes) has caches whose entries differ by layer: compiled, each would be compiled by itself, up to torch's limit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn


class CompiledLayers:
    """Layers that are compiled inside of ``with layers():`` and run as they are elsewhere.

    Args:
        layers: of one model; none: nothing is compiled.
    """

    def __init__(self, layers: Sequence[nn.Module] = ()) -> None:
        self._layers = layers
        for layer in layers:
            layer.compile()
        self._calls = [layer._compiled_call_impl for layer in layers]
        self._set([None] * len(layers))

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Run the layers compiled."""
        self._set(self._calls)
        try:
            yield
        finally:
            self._set([None] * len(self._layers))

    def _set(self, calls: Sequence[Any]) -> None:
        for layer, call in zip(self._layers, calls, strict=True):
            layer._compiled_call_impl = call
