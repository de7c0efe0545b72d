"""How the tokens of answers are chosen: row by row, so that a batch gives what its members give alone.

Notable: a drawn token comes from its row's own random numbers (the maximum of scores plus Gumbel noise is a draw from
their softmax), so a request with a seed is answered the same in any company. Beams, penalties and the like are
`transformers`' own, and hold for a whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StopStringCriteria
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from mllm.errors import MLLMError, near

WARPERS: dict[str, Any] = {  # in the order in which they are applied
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
    "epsilon_cutoff": EpsilonLogitsWarper,
    "eta_cutoff": EtaLogitsWarper,
}
NEUTRAL = {"top_k": 0, "top_p": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "min_p": 0.0}
ROW = ("max_new_tokens", "do_sample", "seed", "stop_strings", "cancelled", *WARPERS)  # may differ within a batch
OURS = ("seed", "cancelled", "logits_processor")


def check(decoding: Mapping[str, Any]) -> None:
    """Refuse what is no decoding setting.

    Raises:
        MLLMError: an unknown name; the near matches are listed.
    """
    known = {*GenerationConfig().to_dict(), *OURS}
    for name in decoding:
        if name not in known:
            raise MLLMError(f"No decoding setting is called {name!r}. {near(name, known)}")


def shared(decodings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the settings that hold for a whole batch.

    Raises:
        MLLMError: rows that differ in one of them.
    """
    found = [{key: value for key, value in decoding.items() if key not in ROW} for decoding in decodings]
    if any(other != found[0] for other in found):
        raise MLLMError(f"Prompts that are decoded together may differ in {', '.join(ROW)} only.")
    return found[0]


def samples(decoding: Mapping[str, Any]) -> bool:
    """Whether a row's tokens are drawn: said, or meant by a temperature, a top-p and the like. Temperature 0: not."""
    meant = any(decoding.get(name) is not None for name in WARPERS) or decoding.get("seed") is not None
    return bool(decoding.get("do_sample", meant)) and decoding.get("temperature") != 0


class Sampler(LogitsProcessor):
    """Leaves the drawn token the highest score in rows that sample, so that greedy search takes it.

    Args:
        decodings: each row's settings; a row without a ``seed`` draws one from torch's own random state.
    """

    def __init__(self, decodings: Sequence[Mapping[str, Any]]) -> None:
        self._rows = [(_warpers(decoding), _generator(decoding)) for decoding in decodings]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores ``(B, V)``."""
        drawn = []
        for row, (warpers, generator) in enumerate(self._rows):
            own = scores[row : row + 1]
            if generator is not None:
                uniform = torch.rand(own.shape, generator=generator).clamp_min(1e-20).to(own.device)
                own = warpers(cast(Any, input_ids[row : row + 1]), own) - (-uniform.log()).log()
            drawn.append(own)
        return torch.cat(drawn)


class RowLimits(StoppingCriteria):
    """Ends each row by its own settings: its length, its stop strings, or because nobody waits for it any more."""

    def __init__(self, decodings: Sequence[Mapping[str, Any]], *, start: int, tokenizer: Any) -> None:
        self._start = start
        self._limits = [decoding.get("max_new_tokens") for decoding in decodings]
        self._stops = [
            StopStringCriteria(tokenizer, decoding["stop_strings"]) if decoding.get("stop_strings") else None
            for decoding in decodings
        ]
        self._cancelled: list[Callable[[], bool] | None] = [decoding.get("cancelled") for decoding in decodings]

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Any:
        """Return ``(B,)``: True where a row has ended."""
        ended = []
        for row, (limit, stop, cancelled) in enumerate(zip(self._limits, self._stops, self._cancelled, strict=True)):
            new = input_ids[row : row + 1, self._start :]
            ended.append(
                (limit is not None and new.shape[1] >= limit)
                or (stop is not None and bool(stop(new, scores)))
                or (cancelled is not None and cancelled())
            )
        return torch.tensor(ended, device=input_ids.device)


def _warpers(decoding: Mapping[str, Any]) -> LogitsProcessorList:
    given = {name: decoding[name] for name in WARPERS if decoding.get(name) not in (None, NEUTRAL.get(name))}
    if not samples(decoding):
        return LogitsProcessorList()
    try:
        return LogitsProcessorList([WARPERS[name](value) for name, value in given.items()])
    except (ValueError, TypeError) as error:
        raise MLLMError(f"These decoding settings do not fit, {given}: {error}") from None


def _generator(decoding: Mapping[str, Any]) -> torch.Generator | None:
    if not samples(decoding):
        return None
    seed = decoding.get("seed")
    return torch.Generator().manual_seed(int(torch.randint(2**62, ()) if seed is None else seed))
