"""Decoding: what one prompt is decoded with, and which prompts can be decoded in one batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import GenerationConfig

from mllm.errors import MLLMError, near

WARPERS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
PER_ROW = ("max_new_tokens", "do_sample", "seed", "stop_strings", "cancelled")
PER_BATCH = ("candidates", "nearest_words")


@dataclass(frozen=True)
class Decoding:
    """What one prompt is decoded with.

    The fields down to ``warpers`` may differ between the prompts of a batch; in the others they must agree.

    Attributes:
        max_new_tokens: the length of an answer, at most; None: no limit.
        do_sample: sample the tokens; None: if a warper or a seed is given.
        seed: of the samples; None: torch's global generator draws one.
        stop_strings: texts after which an answer ends.
        cancelled: is called at every token; True ends the answer.
        warpers: temperature, top-k, top-p and the like (`WARPERS`), by name.
        candidates: how many answers are generated, of which a scorer selects one (`mllm.answering.rerank`).
        nearest_words: options of `mllm.answering.in_words`; None: visual tokens stay.
        parts: arguments of parts of the registry group ``decoding``, such as ``contrastive``, by name.
        processors: logits processors of `transformers`.
        generation: the other fields of `transformers.GenerationConfig`.
    """

    max_new_tokens: int | None = None
    do_sample: bool | None = None
    seed: int | None = None
    stop_strings: Any = None
    cancelled: Callable[[], bool] | None = None
    warpers: Mapping[str, Any] = field(default_factory=dict)
    candidates: int = 1
    nearest_words: Mapping[str, Any] | None = None
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    processors: tuple[Any, ...] = ()
    generation: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, options: Mapping[str, Any], parts: Collection[str] = ()) -> Decoding:
        """Return the decoding that options describe.

        Args:
            options: by name: our fields, ``logits_processor``, parts, and fields of `transformers.GenerationConfig`.
            parts: the names of the registry group ``decoding``.

        Raises:
            MLLMError: an unknown option; the near matches are listed.
        """
        generation = {*GenerationConfig().to_dict()} - {*PER_ROW, *WARPERS}
        known = {*PER_ROW, *PER_BATCH, *WARPERS, *parts, "logits_processor", *generation}
        for name in options:
            if name not in known:
                raise MLLMError(f"No decoding option is called {name!r}. {near(name, known)}")
        given = {name: value for name, value in options.items() if value is not None}
        return cls(
            **{name: given[name] for name in (*PER_ROW, *PER_BATCH) if name in given},
            warpers={name: given[name] for name in WARPERS if name in given},
            parts={name: given[name] for name in parts if name in given},
            processors=tuple(given.get("logits_processor", ())),
            generation={name: value for name, value in options.items() if name in generation},
        )

    @property
    def num_beams(self) -> int:
        """Return the number of beams; 1: no beam search."""
        return int(self.generation.get("num_beams", 1))

    @property
    def samples(self) -> bool:
        """Whether tokens are sampled: requested, or implied by a warper or a seed. Temperature 0 is greedy."""
        implied = bool(self.warpers) or self.seed is not None
        return (implied if self.do_sample is None else bool(self.do_sample)) and self.warpers.get("temperature") != 0

    @property
    def for_batch(self) -> tuple[Any, ...]:
        """Return the fields in which the prompts of a batch must agree."""
        return self.candidates, self.nearest_words, self.parts, self.processors, self.generation


def check_batch(decodings: Sequence[Decoding]) -> None:
    """Refuse decodings that cannot share a batch.

    Raises:
        MLLMError: rows that differ in what holds for a whole batch, or beams with a seed or with different rows.
    """
    first = decodings[0]
    if any(other.for_batch != first.for_batch for other in decodings):
        raise MLLMError(f"Prompts that are decoded together may differ in {', '.join((*PER_ROW, *WARPERS))} only.")
    if first.num_beams < 2:
        return
    if any(decoding.cancelled or decoding != first for decoding in decodings):
        raise MLLMError("Beam search decodes a batch with the same options for all prompts; give all the same.")
    if first.seed is not None:
        raise MLLMError("A seed is for sampling without beams (num_beams=1).")
