"""Apply the penalties and constraints of `transformers` to each prompt of a batch, counting the ids of the whole prompt.

Notable: ``generate`` gets embeddings, or ids of which it reads only the last, so its own processors would count padding
or nothing. Here a row's ids are its prompt's and its new ones. A visual token has an id of its own, one past the
vocabulary, as an image token has in the models of `transformers`; so no penalty falls on the padding id.

Shapes: B prompts, N beams of each (1 without beam search), T ids, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as stock

from mllm.errors import MLLMError


class Row(NamedTuple):
    """What the processors of one prompt are made for.

    Args:
        ids: ``(1, T)`` that precede the new ones: a decoder's prompt, the start token of an encoder-decoder model. Below
            0 at visual tokens.
        encoder_ids: ``(1, T)`` that the encoder reads; a decoder's prompt.
        ends: the ids that end an answer.
        begin: the length of ``ids`` at which the answer begins, a forced first token left out.
        limit: of the length of ``ids`` with the answer.
    """

    ids: Tensor
    encoder_ids: Tensor
    ends: list[int]
    begin: int
    limit: int

    @property
    def start(self) -> int:
        """Return how many ids precede the new ones."""
        return int(self.ids.shape[1])

    @property
    def device(self) -> Any:
        """Return where the ids are."""
        return self.ids.device

    def within(self, vocabulary: int) -> Row:
        """Return the row with the id after the last one of a vocabulary at visual tokens."""
        ids, encoder_ids = (
            torch.where(ids < 0, vocabulary, ids) for ids in (self.ids, self.encoder_ids)
        )
        return self._replace(ids=ids, encoder_ids=encoder_ids)


# In the order in which `transformers` applies them: the option, and the processor of its value.
PROCESSORS: dict[str, Callable[[Any, Row], Any]] = {
    "sequence_bias": lambda value, row: stock.SequenceBiasLogitsProcessor(cast(Any, _biases(value))),
    "encoder_repetition_penalty": lambda value, row: stock.EncoderRepetitionPenaltyLogitsProcessor(
        float(value), cast(Any, row.encoder_ids)
    ),
    "repetition_penalty": lambda value, row: stock.RepetitionPenaltyLogitsProcessor(float(value)),
    "no_repeat_ngram_size": lambda value, row: stock.NoRepeatNGramLogitsProcessor(int(value)),
    "encoder_no_repeat_ngram_size": lambda value, row: stock.EncoderNoRepeatNGramLogitsProcessor(
        int(value), cast(Any, row.encoder_ids)
    ),
    "bad_words_ids": lambda value, row: stock.NoBadWordsLogitsProcessor([list(ids) for ids in value], row.ends),
    "min_length": lambda value, row: stock.MinLengthLogitsProcessor(int(value), row.ends, device=row.device),
    "min_new_tokens": lambda value, row: stock.MinNewTokensLengthLogitsProcessor(
        row.start, int(value), row.ends, device=row.device
    ),
    "forced_bos_token_id": lambda value, row: stock.ForcedBOSTokenLogitsProcessor(int(value)),
    "forced_eos_token_id": lambda value, row: stock.ForcedEOSTokenLogitsProcessor(
        row.limit, value, device=row.device
    ),
    "remove_invalid_values": lambda value, row: stock.InfNanRemoveLogitsProcessor(),
    "exponential_decay_length_penalty": lambda value, row: stock.ExponentialDecayLengthPenalty(
        (int(value[0]), float(value[1])), row.ends, row.start
    ),
    "suppress_tokens": lambda value, row: stock.SuppressTokensLogitsProcessor(list(value), device=row.device),
    "begin_suppress_tokens": lambda value, row: stock.SuppressTokensAtBeginLogitsProcessor(
        list(value), row.begin, device=row.device
    ),
}
NEUTRAL: dict[str, Any] = {
    "repetition_penalty": 1,
    "encoder_repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "remove_invalid_values": False,
}


def active(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that change scores, in the order in which they are applied."""
    given = {name: options[name] for name in PROCESSORS if options.get(name) is not None}
    return {name: value for name, value in given.items() if value != NEUTRAL.get(name)}


class RowProcessors(LogitsProcessor):
    """Applies penalties and constraints to each prompt's rows.

    Args:
        options: by name (`PROCESSORS`), those that are `active`.
        rows: of each prompt.
        start: how many of the ids that a call brings are not new.
    """

    def __init__(self, options: Mapping[str, Any], rows: Sequence[Row], *, start: int) -> None:
        self._options, self._rows, self._start = dict(options), list(rows), start
        self._processors: list[LogitsProcessorList] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores ``(B * N, V)`` of the token after ids ``(B * N, T)``.

        Raises:
            MLLMError: an option that a processor refuses, such as an id outside the vocabulary.
        """
        beams, vocabulary = len(scores) // len(self._rows), scores.shape[1]
        try:
            if not self._processors:
                self._start_with(vocabulary)
            scores = pad(scores, (0, 1), value=-torch.inf)  # a visual token is never generated
            rows = zip(self._rows, self._processors, input_ids.split(beams), scores.split(beams), strict=True)
            processed = [
                processors(cast(Any, torch.cat([row.ids.expand(beams, -1), ids[:, self._start :]], dim=1)), cast(Any, own))
                for row, processors, ids, own in rows
            ]
        except (ValueError, TypeError, IndexError) as error:
            raise MLLMError(f"These decoding options are invalid, {self._options}: {error}") from None
        return torch.cat(cast(Any, processed))[:, :vocabulary]

    def _start_with(self, vocabulary: int) -> None:
        """Make the processors, which are the same for all beams of a prompt."""
        self._rows = [row.within(vocabulary) for row in self._rows]
        self._processors = [
            LogitsProcessorList([PROCESSORS[name](value, row) for name, value in self._options.items()])
            for row in self._rows
        ]


def _biases(value: Any) -> dict[tuple[int, ...], float]:
    """Return ``sequence_bias`` as a mapping; YAML and JSON have pairs of a list of ids and a bias."""
    pairs = value.items() if isinstance(value, Mapping) else value
    return {tuple(ids): float(bias) for ids, bias in pairs}
