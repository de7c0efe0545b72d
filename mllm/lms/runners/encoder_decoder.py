"""Run an encoder-decoder model: the encoder reads the prompt, the decoder generates the answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers.modeling_outputs import BaseModelOutput

from mllm.errors import MLLMError
from mllm.lms.runners.base import Group, Runner, input_embeddings, move_left
from mllm.lms.runners.unpadded import EmbeddingCache
from mllm.prompts.batch import IGNORED


def start_token(model: Any) -> int:
    """Return the id that the decoder of an encoder-decoder model starts with.

    Raises:
        MLLMError: the model does not say.
    """
    configured = (
        model.generation_config.decoder_start_token_id,
        getattr(model.config, "decoder_start_token_id", None),
    )
    start = next((token for token in configured if token is not None), model.generation_config.bos_token_id)
    if start is None:
        raise MLLMError(
            "This encoder-decoder model does not say which token its decoder starts with: set "
            "decoder_start_token_id in its generation_config.json."
        )
    return int(start)


class EncoderDecoderRunner:
    """An encoder that reads everything before an answer, and a decoder that generates the answer.

    Several answers in a row (a conversation that is learned) are as many rows of the decoder, each with everything
    before it in the encoder: as when they are generated. Rows are padded on the right, where position ids start at 0.

    Args:
        model: an encoder-decoder model of `transformers`.
        end: ids that the tokenizer appends to a text: the encoder reads them last.
    """

    inner: Runner | None = None
    window: int | None = None
    separable = False
    whole_batches = True
    takes_block_masks = False
    continues_cache = False
    shares_prefix = False
    selects_logits = False

    def __init__(self, model: Any, end: Sequence[int]) -> None:
        self.model = model
        self._end = list(end)
        self._start = start_token(model)

    def logits(self, embeds: Tensor, mask: Tensor, keep: Tensor | None = None, cache: Any = None) -> Tensor:
        """Return logits ``(B, 1, V)`` of an answer's first token."""
        embeds = embeds if cache is None else cache.add(embeds)
        return self._decoded(self._encoded(embeds, mask), mask.new_empty(len(mask), 0))

    def losses(self, embeds: Tensor, mask: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
        """Return the negative log-likelihood ``(N,)`` of each target, row by row, with label smoothing."""
        is_target = labels != IGNORED
        begins = is_target & ~pad(is_target, (1, 0))[:, :-1]
        rows, columns = begins.nonzero(as_tuple=True)  # of each answer
        before = mask[rows].bool() & (torch.arange(mask.shape[1], device=mask.device) < columns[:, None])
        number = begins.cumsum(1)  # of the answer that a position belongs to, in its row
        is_answer = is_target[rows] & (number[rows] == number[rows, columns][:, None])
        answers, inside = move_left(labels[rows], is_answer)
        logits = self._decoded(self._encoded(embeds[rows], before.long()), answers.masked_fill(~inside, 0)[:, :-1])
        return cross_entropy(logits[inside].float(), answers[inside], reduction="none", label_smoothing=smoothing)

    def hidden(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """Refuse: the encoder's states of a sequence are not those of the decoder."""
        raise MLLMError("A head reads a decoder's states of the sequence; this is an encoder-decoder model.")

    def prefill(self, embeds: Tensor, mask: Tensor) -> tuple[EmbeddingCache, Tensor]:
        """Return the embedding cache with the encoder's states, and the answer's first logits ``(B, V)``."""
        cache = EmbeddingCache(embeds)
        cache.encoded = self._encoded(embeds, mask)
        return cache, self._decoded(cache.encoded, mask.new_empty(len(mask), 0))[:, -1]

    def fork(self, cache: EmbeddingCache, rows: Sequence[int]) -> EmbeddingCache:
        """Return a copy of a cache's rows, to be extended."""
        new = EmbeddingCache(cache.embeds[list(rows)])
        if cache.encoded is not None:
            new.encoded = tuple(tensor[list(rows)] for tensor in cache.encoded)
        return new

    def step(self, cache: EmbeddingCache, ids: Tensor, mask: Tensor, rows: Sequence[int] | None) -> Tensor:
        """Return logits ``(N, V)`` after the first tokens of answers; the encoder runs once."""
        if cache.encoded is None:
            cache.encoded = self._encoded(cache.embeds, mask)
        states, inside = cache.encoded
        return self._decoded((states.expand(len(ids), -1, -1), inside.expand(len(ids), -1)), ids)[:, -1]

    def length(self, cache: EmbeddingCache) -> int:
        """Return the sequence length of a cache."""
        return cache.embeds.shape[1]

    def groups(self, mask: Tensor, cache: EmbeddingCache | None = None, **inputs: Tensor) -> Iterator[Group]:
        """Yield the rows that `transformers` decodes in one call: all."""
        embeds, inside = self._ended(input_embeddings(self.model, cache, inputs), mask)
        yield Group([*range(len(mask))], {"inputs_embeds": embeds, "attention_mask": inside.long()}, 1)

    def _ended(self, embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Append the end to each row and pad it on the right: embeddings, and which of them are no padding."""
        end = torch.tensor([self._end], dtype=torch.long, device=mask.device).expand(len(mask), -1)
        whole = torch.cat([embeds, self.model.get_input_embeddings()(end).to(embeds.dtype)], dim=1)
        return move_left(whole, torch.cat([mask, torch.ones_like(end)], dim=1).bool())

    def _encoded(self, embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        whole, inside = self._ended(embeds, mask)
        return self.model.get_encoder()(inputs_embeds=whole, attention_mask=inside.long()).last_hidden_state, inside

    def _decoded(self, encoded: tuple[Tensor, Tensor], answers: Tensor) -> Tensor:
        """Return logits ``(N, L + 1, V)`` of each answer's first token and of the token after each of its tokens."""
        states, inside = encoded
        first = answers.new_full((len(answers), 1), self._start)
        return self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=inside.long(),
            decoder_input_ids=torch.cat([first, answers], dim=1),
            use_cache=False,
        ).logits
