"""Run a decoder on left-padded batches, with a KV cache."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from mllm.lms import vocabulary
from mllm.lms.runners import probes
from mllm.lms.runners.base import DecoderRunner, Group, capture_head_input, position_ids


class CachedRunner(DecoderRunner):
    """A decoder on left-padded batches, with a KV cache.

    Args:
        model: a causal language model of `transformers`.
    """

    whole_batches = True

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._accepts = set(inspect.signature(model.forward).parameters)
        self.selects_logits = "logits_to_keep" in self._accepts
        self._cache = "cache" if "cache" in self._accepts else "past_key_values"  # renamed in transformers 5.24

    @property
    def accepts_cache(self) -> bool:
        """Whether the model's forward takes a mask and a KV cache."""
        return {"attention_mask", self._cache} <= self._accepts

    @functools.cached_property
    def continues_cache(self) -> bool:
        """Whether several positions at once can follow a KV cache."""
        return probes.continues_cache(self)

    @functools.cached_property
    def shares_prefix(self) -> bool:
        """Whether a batch's rows can start from the KV cache of one sequence."""
        return probes.shares_prefix(self)

    @property
    def takes_block_masks(self) -> bool:
        """Whether masks ``(B, T, T)`` may be tried: a sliding window needs a mask that the model makes by itself."""
        return self.window is None

    @property
    def window(self) -> int | None:
        """Return the length of the shortest sliding window, masked positions counted; None: there is none."""
        layers: list[Any] = DynamicCache(config=self.model.config).layers
        return min((layer.sliding_window for layer in layers if getattr(layer, "is_sliding", False)), default=None)

    def logits(self, embeds: Tensor, mask: Tensor, keep: Tensor | None = None, cache: Any = None) -> Tensor:
        """Return logits ``(B, K, V)``; see `mllm.lms.language_model.LanguageModel.logits`."""
        inputs = self.inputs(embeds, mask, cache)
        if keep is None:
            return self.model(**inputs).logits
        if self.selects_logits:
            return self.model(**inputs, logits_to_keep=keep).logits
        return self.model(**inputs).logits[:, keep]

    def body(self, embeds: Tensor, mask: Tensor, cache: Any = None) -> tuple[Tensor, type]:
        """Return the body's states ``(B, T, D)``, and the class of its output."""
        output = vocabulary.run_body(self.model, **self.inputs(embeds, mask, cache))
        return output.last_hidden_state, type(output)

    def hidden(self, embeds: Tensor, mask: Tensor, cache: Any = None) -> Tensor:
        """Return the states ``(B, T, D)`` that the output embeddings are applied to."""
        return capture_head_input(self.model, lambda: self.model(**self.inputs(embeds, mask, cache)))

    def prefill(self, embeds: Tensor, mask: Tensor, cache: Any = None) -> tuple[Any, Tensor]:
        """Return the KV cache, and the next token's logits ``(B, V)``."""
        last = {"logits_to_keep": 1} if self.selects_logits else {}
        output = self.model(**{**self.inputs(embeds, mask, cache), "use_cache": True}, **last)
        return output[self._cache], output.logits[:, -1]

    def fork(self, cache: Any, rows: Sequence[int]) -> Any:
        """Return a copy of a cache's rows, to be extended."""
        new = copy.copy(cache)
        new.layers = [copy.copy(layer) for layer in cache.layers]
        new.reorder_cache(torch.tensor(rows, device=self.model.device))  # makes new tensors
        return new

    def step(self, cache: Any, ids: Tensor, mask: Tensor, rows: Sequence[int] | None) -> Tensor:
        """Return logits ``(N, V)`` after the first tokens of answers; all but the last of them are in the cache."""
        if rows is not None:
            cache.reorder_cache(torch.tensor(rows, device=ids.device))
        whole = torch.cat([mask.expand(len(ids), -1), torch.ones_like(ids)], dim=1)
        return self.logits(self.model.get_input_embeddings()(ids[:, -1:]), whole, cache=cache)[:, -1]

    def groups(self, mask: Tensor, cache: Any = None, **inputs: Tensor) -> Iterator[Group]:
        """Yield the rows that `transformers` decodes in one call: all."""
        start = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        yield Group([*range(len(mask))], {"attention_mask": mask, self._cache: cache, **inputs}, start)

    def length(self, cache: Any) -> int:
        """Return the sequence length of a cache."""
        return int(cache.get_seq_length())

    def inputs(self, embeds: Tensor, mask: Tensor, cache: Any = None) -> dict[str, Any]:
        """Return the arguments of the model's forward."""
        inputs: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": mask}
        if mask.dim() == 3:
            lowest = torch.finfo(embeds.dtype).min
            bias = torch.zeros_like(mask, dtype=embeds.dtype).masked_fill(~mask, lowest)
            inputs["attention_mask"] = bias[:, None]  # (B, 1, T, T), added to the attention's scores
        if cache is not None:
            inputs |= {self._cache: cache, "use_cache": True}
        elif "use_cache" in self._accepts:
            inputs["use_cache"] = False
        if "position_ids" in self._accepts:
            inputs["position_ids"] = position_ids(mask)[:, -embeds.shape[1] :]
        return inputs
