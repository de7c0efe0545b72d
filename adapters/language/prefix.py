"""Prefix tuning (arXiv:2101.00190): learned keys and values before every sequence, in every layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from mllm.errors import MLLMError
from mllm.lms.adapting import Switchable


class PrefixTuning(Switchable):
    """Put learned keys and values before every sequence, without the reparametrisation by an MLP.

    Args:
        model: a decoder of `transformers` with key-value states; it stays as it is.
        positions: how many.
        std: of the values drawn at the start.

    Raises:
        MLLMError: the model has no such states.
    """

    def __init__(self, model: Any, *, positions: int = 20, std: float = 0.02) -> None:
        super().__init__()
        self._config = model.config
        self._dtype = model.dtype
        self.keys, self.values = nn.ParameterList(), nn.ParameterList()
        for key, value in _shapes(model):
            for part, like in ((self.keys, key), (self.values, value)):
                heads, _, dim = like.shape[1:]
                part.append(nn.Parameter(torch.randn(heads, positions, dim, device=like.device) * std))

    @property
    def num_positions(self) -> int:
        """Return how many positions come first."""
        return self.keys[0].shape[1] if self.on else 0

    def states(self, rows: int) -> Any:
        """Return a cache that holds the prefix for ``rows`` rows."""
        cache = DynamicCache(config=self._config)
        for index, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            cache.update(*(part.to(self._dtype).expand(rows, -1, -1, -1) for part in (key, value)), index)
        return cache


@torch.no_grad()
def _shapes(model: Any) -> list[tuple[Any, Any]]:
    """Return keys and values ``(1, heads, 1, dim)`` of each layer, by running one token."""
    table = model.get_input_embeddings()
    one = table(torch.zeros(1, 1, dtype=torch.long, device=table.weight.device))
    cache = None if model.config.is_encoder_decoder else model(inputs_embeds=one, use_cache=True).get("past_key_values")
    layers = getattr(cache, "layers", [])
    if not layers or not all(getattr(layer, "keys", None) is not None for layer in layers):
        raise MLLMError(
            "adapters: prefix tuning needs a decoder whose every layer has keys and values, which this language model "
            "is not. Take prompt tuning."
        )
    return [(layer.keys, layer.values) for layer in layers]
