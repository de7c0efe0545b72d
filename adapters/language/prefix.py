"""Prepend learned keys and values to every sequence, in every layer: prefix tuning (arXiv:2101.00190)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from mllm.errors import MLLMError
from mllm.lms.adapting import Switchable
from mllm.registry import Count, NonNegative


class PrefixTuning(Switchable):
    """Prepend learned keys and values to every sequence, without the reparametrization by an MLP.

    Args:
        model: a decoder of `transformers` with a KV cache in every layer; it does not change.
        positions: the prefix length.
        std: of the random initial values.

    Raises:
        MLLMError: the model has no such cache.
    """

    def __init__(self, model: Any, *, positions: Count = 20, std: NonNegative = 0.02) -> None:
        super().__init__()
        self._lm = (model,)  # in a tuple, it is no submodule
        self.keys, self.values = nn.ParameterList(), nn.ParameterList()
        for key, value in _shapes(model):
            for parameters, template in ((self.keys, key), (self.values, value)):
                heads, _, dim = template.shape[1:]
                parameters.append(nn.Parameter((torch.randn(heads, positions, dim) * std).to(template.device)))

    @property
    def num_positions(self) -> int:
        """Return the prefix length; 0 while the adapter is off."""
        return self.keys[0].shape[1] if self.on else 0

    def states(self, rows: int) -> Any:
        """Return a KV cache that contains the prefix for ``rows`` rows."""
        cache = DynamicCache(config=self._lm[0].config)
        for index, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            cache.update(*(part.to(self._lm[0].dtype).expand(rows, -1, -1, -1) for part in (key, value)), index)
        return cache


@torch.no_grad()
def _shapes(model: Any) -> list[tuple[Any, Any]]:
    """Return the keys and values ``(1, heads, 1, dim)`` of each layer for one token."""
    table = model.get_input_embeddings()
    embeds = table(torch.zeros(1, 1, dtype=torch.long, device=table.weight.device))
    cache = None
    if not model.config.is_encoder_decoder:
        cache = model(inputs_embeds=embeds, use_cache=True).get("past_key_values")
    layers = getattr(cache, "layers", [])
    if not layers or not all(getattr(layer, "keys", None) is not None for layer in layers):
        raise MLLMError(
            "adapters: prefix needs a decoder-only language model with keys and values in every layer, and this one is "
            "not. Use prompt tuning: {type: prompt}."
        )
    return [(layer.keys, layer.values) for layer in layers]
