"""Run an encoder-decoder model: the encoder reads the prompt, the decoder makes the answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers.modeling_outputs import BaseModelOutput

from mllm.errors import MLLMError
from mllm.lms.runners.base import Group, packed, whole_embeds
from mllm.lms.runners.unpadded import Seen
from mllm.prompts.batch import IGNORED


class EncoderDecoder:
    """An encoder that reads what stands before an answer, and a decoder that makes the answer.

    Several answers in a row (a conversation that is learnt) are as many rows of the decoder, each with all that stands
    before it in the encoder: as when they are generated. Rows are padded on the right, where positions start at 0.

    Args:
        model: an encoder-decoder model of `transformers`.
        end: ids that the tokenizer puts behind a text: the encoder reads them last.
    """

    goes_on = False

    def __init__(self, model: Any, end: Sequence[int]) -> None:
        self.model = model
        self._end = list(end)
        given = (model.generation_config.decoder_start_token_id, getattr(model.config, "decoder_start_token_id", None))
        start = next((token for token in given if token is not None), model.generation_config.bos_token_id)
        if start is None:
            raise MLLMError(
                "This encoder-decoder model does not say which token its decoder starts with: set "
                "decoder_start_token_id in its generation_config.json."
            )
        self._start = int(start)

    def can_pack(self) -> bool:
        """Whether prompts can share a row."""
        return False

    def logits(self, embeds: Tensor, mask: Tensor, keep: Tensor | None = None, cache: Any = None) -> Tensor:
        """Return logits ``(B, 1, V)`` of an answer's first token."""
        embeds = embeds if cache is None else cache.add(embeds)
        return self._decoded(self._encoded(embeds, mask), mask.new_empty(len(mask), 0))

    def losses(self, embeds: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Return the negative log-likelihood ``(N,)`` of each target, row by row."""
        wanted = labels != IGNORED
        begins = wanted & ~pad(wanted, (1, 0))[:, :-1]
        rows, columns = begins.nonzero(as_tuple=True)  # of each answer
        before = mask[rows].bool() & (torch.arange(mask.shape[1], device=mask.device) < columns[:, None])
        number = begins.cumsum(1)  # of the answer that a place belongs to, in its row
        own = wanted[rows] & (number[rows] == number[rows, columns][:, None])
        answers, inside = packed(labels[rows], own)
        logits = self._decoded(self._encoded(embeds[rows], before.long()), answers.masked_fill(~inside, 0)[:, :-1])
        return cross_entropy(logits[inside].float(), answers[inside], reduction="none")

    def hidden(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """Refuse: the states of a sequence and those of the decoder are not the same."""
        raise MLLMError("A head reads a decoder's states of the sequence; this is an encoder-decoder model.")

    def prefill(self, embeds: Tensor, mask: Tensor) -> tuple[Seen, Tensor]:
        """Return what was seen, with the encoder's states of it, and the answer's first logits ``(B, V)``."""
        seen = Seen(embeds)
        seen.states = self._encoded(embeds, mask)
        return seen, self._decoded(seen.states, mask.new_empty(len(mask), 0))[:, -1]

    def fork(self, cache: Seen, rows: Sequence[int]) -> Seen:
        """Return what these rows saw, to be added to."""
        new = Seen(cache.embeds[list(rows)])
        if cache.states is not None:
            new.states = tuple(states[list(rows)] for states in cache.states)
        return new

    def step(self, cache: Seen, ids: Tensor, mask: Tensor, rows: Sequence[int] | None) -> Tensor:
        """Return logits ``(N, V)`` behind the first tokens of answers; the encoder runs once."""
        if cache.states is None:
            cache.states = self._encoded(cache.embeds, mask)
        states, inside = cache.states
        return self._decoded((states.expand(len(ids), -1, -1), inside.expand(len(ids), -1)), ids)[:, -1]

    def length(self, cache: Seen) -> int:
        """Return how many positions were seen."""
        return cache.embeds.shape[1]

    def groups(self, mask: Tensor, cache: Seen | None = None, **inputs: Tensor) -> Iterator[Group]:
        """Yield what `transformers` decodes in one go."""
        embeds, inside = self._ended(whole_embeds(self.model, cache, inputs), mask)
        yield Group([*range(len(mask))], {"inputs_embeds": embeds, "attention_mask": inside.long()}, 1)

    def _ended(self, embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Put the end behind each row and pad it on the right: embeddings and which of them count."""
        end = torch.tensor([self._end], dtype=torch.long, device=mask.device).expand(len(mask), -1)
        whole = torch.cat([embeds, self.model.get_input_embeddings()(end).to(embeds.dtype)], dim=1)
        return packed(whole, torch.cat([mask, torch.ones_like(end)], dim=1).bool())

    def _encoded(self, embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        own, inside = self._ended(embeds, mask)
        return self.model.get_encoder()(inputs_embeds=own, attention_mask=inside.long()).last_hidden_state, inside

    def _decoded(self, encoded: tuple[Tensor, Tensor], answers: Tensor) -> Tensor:
        """Return logits ``(N, L + 1, V)``: of each answer's first token, and of what follows each of its tokens."""
        states, inside = encoded
        first = answers.new_full((len(answers), 1), self._start)
        return self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=inside.long(),
            decoder_input_ids=torch.cat([first, answers], dim=1),
            use_cache=False,
        ).logits
