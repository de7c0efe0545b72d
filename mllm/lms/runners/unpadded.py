"""Run a decoder that ignores masks: rows of equal length together, without padding."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mllm.lms import vocabulary
from mllm.lms.cross_attention import current, looking
from mllm.lms.runners.base import Group, by_length, losses_of, read_by_head, whole_embeds


class Seen:
    """What was read, kept as embeddings ``(B, T, D)``: where states cannot be gone on from, it is read again."""

    def __init__(self, embeds: Tensor) -> None:
        self.embeds = embeds
        self.states: Any = None  # an encoder's, of all that was read

    def add(self, embeds: Tensor) -> Tensor:
        """Add what was read since, and return all."""
        self.embeds, self.states = torch.cat([self.embeds, embeds], dim=1), None
        return self.embeds


class Apart:
    """A decoder that ignores masks: rows of equal length run together, masked places left out.

    Args:
        model: a causal language model of `transformers`.
    """

    goes_on = False  # there are no states to go on from

    def __init__(self, model: Any) -> None:
        self.model = model

    def can_pack(self) -> bool:
        """Whether prompts can share a row."""
        return False

    def logits(self, embeds: Tensor, mask: Tensor, keep: Tensor | None = None, cache: Any = None) -> Tensor:
        """Return logits ``(B, K, V)``; see `mllm.lms.language_model.LanguageModel.logits`."""
        new = embeds.shape[1]
        embeds = embeds if cache is None else cache.add(embeds)
        logits = self._by_length(lambda own: self.model(inputs_embeds=own, use_cache=False).logits, embeds, mask)
        return logits[:, -new:] if keep is None else logits[:, -new:][:, keep]

    def losses(self, embeds: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Return the negative log-likelihood ``(N,)`` of each target, row by row."""
        return losses_of(self, embeds, mask, labels)

    def body(self, embeds: Tensor, mask: Tensor, cache: Any = None) -> tuple[Tensor, type]:
        """Return the body's states ``(B, T, D)``, and the class of what it returns."""
        kinds = []

        def run(own: Tensor) -> Tensor:
            output = vocabulary.read(self.model, inputs_embeds=own, use_cache=False)
            kinds.append(type(output))
            return output.last_hidden_state

        return self._by_length(run, embeds, mask), kinds[0]

    @functools.cached_property
    def separable(self) -> bool:
        """Whether the model is a body and a head."""
        with looking(None):  # it is tried on another sequence than the one that asks
            return vocabulary.separable(self.model)

    def hidden(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """Return the states ``(B, T, D)`` that the vocabulary's map reads."""

        def run(own: Tensor) -> Tensor:
            return read_by_head(self.model, lambda: self.model(inputs_embeds=own, use_cache=False))

        return self._by_length(run, embeds, mask)

    def prefill(self, embeds: Tensor, mask: Tensor) -> tuple[Seen, Tensor]:
        """Return what was seen, and the next token's logits ``(B, V)``."""
        return Seen(embeds), self.logits(embeds, mask)[:, -1]

    def fork(self, cache: Seen, rows: Sequence[int]) -> Seen:
        """Return what these rows saw, to be added to."""
        return Seen(cache.embeds[list(rows)])

    def step(self, cache: Seen, ids: Tensor, mask: Tensor, rows: Sequence[int] | None) -> Tensor:
        """Return logits ``(N, V)`` behind the first tokens of answers."""
        new = self.model.get_input_embeddings()(ids)
        whole = torch.cat([mask.expand(len(ids), -1), torch.ones_like(ids)], dim=1)
        return self.logits(torch.cat([cache.embeds.expand(len(ids), -1, -1), new], dim=1), whole)[:, -1]

    def length(self, cache: Seen) -> int:
        """Return how many positions were seen."""
        return cache.embeds.shape[1]

    def groups(self, mask: Tensor, cache: Seen | None = None, **inputs: Tensor) -> Iterator[Group]:
        """Yield what `transformers` decodes in one go: rows of one length."""
        embeds = whole_embeds(self.model, cache, inputs)
        for rows, inside in by_length(mask):
            own = embeds[rows][inside].unflatten(0, (len(rows), -1))
            ones = torch.ones(own.shape[:2], dtype=torch.long, device=own.device)
            yield Group(rows.tolist(), {"inputs_embeds": own, "attention_mask": ones}, 0)

    def _by_length(self, run: Callable[[Tensor], Tensor], embeds: Tensor, mask: Tensor) -> Tensor:
        """Run rows of each length, and put what comes out ``(n, length, X)`` where it belongs in ``(B, T, X)``."""
        places, values, sight = [], [], current()
        for rows, inside in by_length(mask):
            row, column = inside.nonzero(as_tuple=True)
            places.append(torch.stack([rows[row], column]))
            with looking(sight and sight.unpadded(rows, mask)):
                values.append(run(embeds[rows][inside].unflatten(0, (len(rows), -1))).flatten(0, 1))
        found, (row, column) = torch.cat(values), torch.cat(places, dim=1)
        return found.new_zeros(*mask.shape, found.shape[-1]).index_put((row, column), found)
