"""Run a decoder that ignores masks: rows of equal length together, without padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mllm.lms import vocabulary
from mllm.lms.cross_attention import current_memory, using_memory
from mllm.lms.runners.base import DecoderRunner, Group, by_length, capture_head_input, input_embeddings


class EmbeddingCache:
    """The embeddings ``(B, T, D)`` of a prefix: where a model has no KV cache, they are encoded again."""

    def __init__(self, embeds: Tensor) -> None:
        self.embeds = embeds
        self.encoded: Any = None  # an encoder's states of the whole prefix

    def add(self, embeds: Tensor) -> Tensor:
        """Append embeddings, and return all."""
        self.embeds, self.encoded = torch.cat([self.embeds, embeds], dim=1), None
        return self.embeds


class UnpaddedRunner(DecoderRunner):
    """A decoder that ignores masks: rows of equal length run together, masked positions left out.

    Args:
        model: a causal language model of `transformers`.
    """

    window: int | None = None
    whole_batches = False
    takes_block_masks = False
    continues_cache = False  # there is no KV cache
    shares_prefix = False
    selects_logits = False

    def logits(self, embeds: Tensor, mask: Tensor, keep: Tensor | None = None, cache: Any = None) -> Tensor:
        """Return logits ``(B, K, V)``; see `mllm.lms.language_model.LanguageModel.logits`."""
        new = embeds.shape[1]
        embeds = embeds if cache is None else cache.add(embeds)
        logits = self._by_length(lambda rows: self.model(inputs_embeds=rows, use_cache=False).logits, embeds, mask)
        return logits[:, -new:] if keep is None else logits[:, -new:][:, keep]

    def body(self, embeds: Tensor, mask: Tensor, cache: Any = None) -> tuple[Tensor, type]:
        """Return the body's states ``(B, T, D)``, and the class of its output."""
        classes = []

        def run(rows: Tensor) -> Tensor:
            output = vocabulary.run_body(self.model, inputs_embeds=rows, use_cache=False)
            classes.append(type(output))
            return output.last_hidden_state

        return self._by_length(run, embeds, mask), classes[0]

    def hidden(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """Return the states ``(B, T, D)`` that the output embeddings are applied to."""

        def run(rows: Tensor) -> Tensor:
            return capture_head_input(self.model, lambda: self.model(inputs_embeds=rows, use_cache=False))

        return self._by_length(run, embeds, mask)

    def prefill(self, embeds: Tensor, mask: Tensor) -> tuple[EmbeddingCache, Tensor]:
        """Return the embedding cache, and the next token's logits ``(B, V)``."""
        return EmbeddingCache(embeds), self.logits(embeds, mask)[:, -1]

    def fork(self, cache: EmbeddingCache, rows: Sequence[int]) -> EmbeddingCache:
        """Return a copy of a cache's rows, to be extended."""
        return EmbeddingCache(cache.embeds[list(rows)])

    def step(self, cache: EmbeddingCache, ids: Tensor, mask: Tensor, rows: Sequence[int] | None) -> Tensor:
        """Return logits ``(N, V)`` after the first tokens of answers."""
        new = self.model.get_input_embeddings()(ids)
        whole = torch.cat([mask.expand(len(ids), -1), torch.ones_like(ids)], dim=1)
        return self.logits(torch.cat([cache.embeds.expand(len(ids), -1, -1), new], dim=1), whole)[:, -1]

    def length(self, cache: EmbeddingCache) -> int:
        """Return the sequence length of a cache."""
        return cache.embeds.shape[1]

    def groups(self, mask: Tensor, cache: EmbeddingCache | None = None, **inputs: Tensor) -> Iterator[Group]:
        """Yield the rows that `transformers` decodes in one call: those of one length."""
        embeds = input_embeddings(self.model, cache, inputs)
        for rows, inside in by_length(mask):
            unpadded = embeds[rows][inside].unflatten(0, (len(rows), -1))
            ones = torch.ones(unpadded.shape[:2], dtype=torch.long, device=unpadded.device)
            yield Group(rows.tolist(), {"inputs_embeds": unpadded, "attention_mask": ones}, 0)

    def _by_length(self, run: Callable[[Tensor], Tensor], embeds: Tensor, mask: Tensor) -> Tensor:
        """Run the rows of each length, and put the results ``(n, length, X)`` at their positions in ``(B, T, X)``."""
        indices, values, memory = [], [], current_memory()
        for rows, inside in by_length(mask):
            row, column = inside.nonzero(as_tuple=True)
            indices.append(torch.stack([rows[row], column]))
            with using_memory(memory and memory.unpadded(rows, mask)):
                values.append(run(embeds[rows][inside].unflatten(0, (len(rows), -1))).flatten(0, 1))
        flat, (row, column) = torch.cat(values), torch.cat(indices, dim=1)
        return flat.new_zeros(*mask.shape, flat.shape[-1]).index_put((row, column), flat)
