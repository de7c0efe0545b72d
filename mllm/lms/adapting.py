"""What stands inside a language model and can be switched off: adapters, new tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from mllm.errors import MLLMError


class Switched(nn.Module):
    """A module that computes nothing while it is off; it is on until it is told."""

    on = True

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Compute without it."""
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
        raise MLLMError("adapters: this language model has no list of layers that an adapter could be put into.")
    return max(lists, key=len)
