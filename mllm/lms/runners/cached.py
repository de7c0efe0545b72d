"""Run a decoder on left-padded batches, with key-value states."""

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
from mllm.lms.cross_attention import looking
from mllm.lms.runners.base import Group, losses_of, positions, read_by_head


class Cached:
    """A decoder on left-padded batches, with key-value states.

    Args:
        model: a causal language model of `transformers`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._accepts = set(inspect.signature(model.forward).parameters)
        self.keeps = "logits_to_keep" in self._accepts  # makes logits for some positions alone
        self._states = "cache" if "cache" in self._accepts else "past_key_values"  # renamed in transformers 5.24

    def can_run(self) -> bool:
        """Whether padding and masked places change nothing, by a probe: a few tokens, with and without them."""
        if not {"attention_mask", self._states} <= self._accepts:
            return False
        table = self.model.get_input_embeddings()
        ids = torch.arange(1, 8, device=self.model.device)[None] % table.weight.shape[0]
        with torch.no_grad():
            embeds = table(ids)
            plain = self.logits(embeds[:, [2, 3, 4, 6]], torch.ones_like(ids[:, :4]))[:, -1]
            cache, _ = self.prefill(embeds[:, :6], torch.tensor([[0, 0, 1, 1, 1, 1]], device=ids.device))
            mask = torch.tensor([[0, 0, 1, 1, 1, 0, 1]], device=ids.device)
            masked = self.logits(embeds[:, 6:], mask, cache=cache)[:, -1]
        return self._alike(plain, masked)

    def can_pack(self) -> bool:
        """Whether prompts that share a row do not touch each other, by a probe: two, packed and alone."""
        if self.windowed:  # a window over masked places is the model's own to make, from a mask of another form
            return False
        table = self.model.get_input_embeddings()
        ids = torch.arange(1, 8, device=self.model.device)[None] % table.weight.shape[0]
        block = torch.block_diag(torch.ones(3, 3), torch.ones(4, 4)).tril().bool().to(ids.device)
        with torch.no_grad(), vocabulary.still(self.model):
            embeds = table(ids)
            alone = [self.logits(part, torch.ones_like(part[..., 0].long())) for part in embeds.split([3, 4], dim=1)]
            try:
                packed = self.logits(embeds, block[None])
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
                return False  # it takes masks (B, T) alone
        return self._alike(torch.cat(alone, dim=1), packed)

    @functools.cached_property
    def goes_on(self) -> bool:
        """Whether several positions at once can follow on key-value states, by a probe: with them and without."""
        table = self.model.get_input_embeddings()
        ids = torch.arange(1, 8, device=self.model.device)[None] % table.weight.shape[0]
        mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]], device=ids.device)
        with torch.no_grad(), vocabulary.still(self.model):
            embeds = table(ids)
            cache, _ = self.prefill(embeds[:, :5], mask[:, :5])
            return self._alike(self.logits(embeds, mask)[:, -2:], self.logits(embeds[:, 5:], mask, cache=cache))

    def _alike(self, expected: Tensor, found: Tensor) -> bool:
        coarse = getattr(self.model, "is_quantized", False)  # its rounding depends on the whole batch
        eps = torch.finfo(torch.bfloat16 if coarse else expected.dtype).eps
        tolerance = eps ** (1 / 3) * expected.float().std()  # what ignores masks is far off
        return bool((expected - found).float().std() <= tolerance)

    def logits(self, embeds: Tensor, mask: Tensor, keep: Tensor | None = None, cache: Any = None) -> Tensor:
        """Return logits ``(B, K, V)``; see `mllm.lms.language_model.LanguageModel.logits`."""
        options = self._inputs(embeds, mask, cache)
        if keep is None:
            return self.model(**options).logits
        if self.keeps:
            return self.model(**options, logits_to_keep=keep).logits
        return self.model(**options).logits[:, keep]

    def losses(self, embeds: Tensor, mask: Tensor, labels: Tensor, cache: Any = None) -> Tensor:
        """Return the negative log-likelihood ``(N,)`` of each target, row by row."""
        return losses_of(self, embeds, mask, labels, cache)

    def body(self, embeds: Tensor, mask: Tensor, cache: Any = None) -> tuple[Tensor, type]:
        """Return the body's states ``(B, T, D)``, and the class of what it returns."""
        output = vocabulary.read(self.model, **self._inputs(embeds, mask, cache))
        return output.last_hidden_state, type(output)

    @functools.cached_property
    def separable(self) -> bool:
        """Whether the model is a body and a head."""
        with looking(None):  # it is tried on another sequence than the one that asks
            return vocabulary.separable(self.model)

    def hidden(self, embeds: Tensor, mask: Tensor, cache: Any = None) -> Tensor:
        """Return the states ``(B, T, D)`` that the vocabulary's map reads."""
        return read_by_head(self.model, lambda: self.model(**self._inputs(embeds, mask, cache)))

    def prefill(self, embeds: Tensor, mask: Tensor, cache: Any = None) -> tuple[Any, Tensor]:
        """Return the key-value states, and the next token's logits ``(B, V)``."""
        last = {"logits_to_keep": 1} if self.keeps else {}
        output = self.model(**{**self._inputs(embeds, mask, cache), "use_cache": True}, **last)
        return output[self._states], output.logits[:, -1]

    def fork(self, cache: Any, rows: Sequence[int]) -> Any:
        """Return the states of these rows, to be added to."""
        new = copy.copy(cache)
        new.layers = [copy.copy(layer) for layer in cache.layers]
        new.reorder_cache(torch.tensor(rows, device=self.model.device))  # makes new tensors
        return new

    def step(self, cache: Any, ids: Tensor, mask: Tensor, rows: Sequence[int] | None) -> Tensor:
        """Return logits ``(N, V)`` behind the first tokens of answers; all but the last of them are in the cache."""
        if rows is not None:
            cache.reorder_cache(torch.tensor(rows, device=ids.device))
        whole = torch.cat([mask.expand(len(ids), -1), torch.ones_like(ids)], dim=1)
        return self.logits(self.model.get_input_embeddings()(ids[:, -1:]), whole, cache=cache)[:, -1]

    def groups(self, mask: Tensor, cache: Any = None, **inputs: Tensor) -> Iterator[Group]:
        """Yield what `transformers` decodes in one go."""
        start = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        yield Group([*range(len(mask))], {"attention_mask": mask, self._states: cache, **inputs}, start)

    @property
    def window(self) -> int | None:
        """Return over how many places a layer looks back, masked ones counted; None: over all."""
        layers: list[Any] = DynamicCache(config=self.model.config).layers
        return min((layer.sliding_window for layer in layers if getattr(layer, "is_sliding", False)), default=None)

    @property
    def windowed(self) -> bool:
        """Whether a layer looks back over so many places only."""
        return self.window is not None

    def length(self, cache: Any) -> int:
        """Return how many positions are in the cache."""
        return int(cache.get_seq_length())

    def _inputs(self, embeds: Tensor, mask: Tensor, cache: Any = None) -> dict[str, Any]:
        options: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": mask}
        if mask.dim() == 3:
            lowest = torch.finfo(embeds.dtype).min
            hidden = torch.zeros_like(mask, dtype=embeds.dtype).masked_fill(~mask, lowest)
            options["attention_mask"] = hidden[:, None]  # (B, 1, T, T), added to the attention's scores
        if cache is not None:
            options |= {self._states: cache, "use_cache": True}
        elif "use_cache" in self._accepts:
            options["use_cache"] = False
        if "position_ids" in self._accepts:
            options["position_ids"] = positions(mask)[:, -embeds.shape[1] :]
        return options
