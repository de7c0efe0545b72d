"""The base of modules inside a language model that can be switched off: adapters and new tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from mllm.errors import MLLMError


class Switchable(nn.Module):
    """A module that computes nothing while it is off; it starts switched on."""

    on = True

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Switch the module off within a ``with`` block."""
        self.on = False
        try:
            yield
        finally:
            self.on = True


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the layers of a decoder: the longest list of modules of one class."""
    root: Any = model
    root = root.get_decoder() if root.config.is_encoder_decoder else root
    lists = [m for m in root.modules() if isinstance(m, nn.ModuleList) and len({type(child) for child in m}) == 1]
    if not lists:
        raise MLLMError("adapters: this language model has no list of layers to put an adapter into.")
    return max(lists, key=len)
