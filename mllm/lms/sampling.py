"""Sample and end the answers of a batch row by row, so that a batch gives what its members give alone.

Notable: a sampled token comes from one number of its row's random generator (the place where the cumulative
probabilities reach it), so a request with a seed gets the same answer in any batch. Beams are those of `transformers`;
penalties and constraints are in `mllm.lms.row_processors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from mllm.errors import MLLMError
from mllm.lms.decoding import Decoding

CLASSES: dict[str, Any] = {  # in the order in which they are applied
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
    "epsilon_cutoff": EpsilonLogitsWarper,
    "eta_cutoff": EtaLogitsWarper,
}
NEUTRAL = {"top_k": 0, "top_p": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "min_p": 0.0}


class Sampler(LogitsProcessor):
    """Gives the sampled token the highest score in rows that sample, so that greedy search selects it.

    Args:
        decodings: of each row; one without a seed draws it from torch's global generator.
    """

    def __init__(self, decodings: Sequence[Decoding]) -> None:
        self._generators = {row: _generator(decoding) for row, decoding in enumerate(decodings) if decoding.samples}
        self._alike: dict[tuple[tuple[str, Any], ...], list[int]] = {}  # rows of the same warpers
        for row in self._generators:
            self._alike.setdefault(_active(decodings[row]), []).append(row)
        self._warpers = [_warpers(active) for active in self._alike]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores ``(B, V)``."""
        result = scores.clone() if self._alike else scores
        for rows, warpers in zip(self._alike.values(), self._warpers, strict=True):
            chances = warpers(cast(Any, input_ids[rows]), scores[rows]).softmax(-1).cumsum(-1, dtype=torch.double)
            uniform = torch.cat([torch.rand(1, dtype=torch.double, generator=self._generators[row]) for row in rows])
            reached = uniform.to(chances.device)[:, None] * chances[:, -1:]
            tokens = torch.searchsorted(chances, reached, right=True).clamp_max(scores.shape[-1] - 1)
            result[rows] = torch.full_like(scores[rows], -torch.inf).scatter_(1, tokens, 0.0)
        return result


class RowLimits(StoppingCriteria):
    """Ends the rows of each prompt by its own decoding: its length, its stop strings, or because it was cancelled.

    Args:
        decodings: of each prompt, which has as many rows as beam search continues.
        start: how many of the first ids are not new.
        tokenizer: of `transformers`.
    """

    def __init__(self, decodings: Sequence[Decoding], *, start: int, tokenizer: Any) -> None:
        self._start, self._decodings = start, list(decodings)
        self._stops = [
            StopStrings(tokenizer, decoding.stop_strings) if decoding.stop_strings else None for decoding in decodings
        ]

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Any:
        """Return ``(B,)``: True where a row has ended."""
        new = input_ids[:, self._start :]
        rows = new.split(len(new) // len(self._decodings))
        return torch.cat([self._ended(*row) for row in zip(self._decodings, self._stops, rows, strict=True)])

    def _ended(self, decoding: Decoding, stop: Any, new: Tensor) -> Tensor:
        full = decoding.max_new_tokens is not None and new.shape[1] >= decoding.max_new_tokens
        if full or (decoding.cancelled is not None and decoding.cancelled()):
            return new.new_ones(len(new), dtype=torch.bool)
        if stop is None:
            return new.new_zeros(len(new), dtype=torch.bool)
        return torch.tensor([stop.ends(ids) for ids in new.tolist()], device=new.device)


class StopStrings:
    """Recognises stop strings at the end of a text, control words included.

    `StopStringCriteria` of `transformers` compares every stop string with every token of the vocabulary, at each of its
    characters, which takes seconds to minutes for a long one.

    Args:
        tokenizer: of `transformers`.
        stops: a text or several.
    """

    def __init__(self, tokenizer: Any, stops: str | Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, [stops] if isinstance(stops, str) else list(stops)
        self._tail = 4 * max(map(len, self._stops)) + 4  # tokens: a character has up to four, one for each byte

    def ends(self, ids: Sequence[int]) -> bool:
        """Whether a stop string is in the text of the last ids."""
        text = self._tokenizer.decode(ids[-self._tail :], clean_up_tokenization_spaces=False)
        return any(stop in text for stop in self._stops)


def _active(decoding: Decoding) -> tuple[tuple[str, Any], ...]:
    """Return the options that change the scores, with their values, in the order of `CLASSES`."""
    values = decoding.warpers
    return tuple((name, values[name]) for name in CLASSES if name in values and values[name] != NEUTRAL.get(name))


def _warpers(active: Sequence[tuple[str, Any]]) -> LogitsProcessorList:
    try:
        return LogitsProcessorList([CLASSES[name](value) for name, value in active])
    except (ValueError, TypeError) as error:
        raise MLLMError(f"These decoding options are invalid, {dict(active)}: {error}") from None


def _generator(decoding: Decoding) -> torch.Generator:
    seed = int(torch.randint(2**62, ())) if decoding.seed is None else decoding.seed
    return torch.Generator().manual_seed(seed)
