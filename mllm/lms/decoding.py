"""Decoding: what one prompt is decoded with, and which prompts can be decoded in one batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import GenerationConfig

from mllm.errors import MLLMError, near
from mllm.lms.decoding_values import check_values
from mllm.lms.row_processors import PROCESSORS

WARPERS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
PER_ROW = ("max_new_tokens", "do_sample", "seed", "stop_strings", "cancelled")
PER_BATCH = ("candidates", "nearest_words")
BEAMS = ("num_beams", "length_penalty", "early_stopping", "renormalize_logits")
GENERATION = (*BEAMS, *PROCESSORS, "max_time")  # the fields of `GenerationConfig` that are taken
NEUTRAL = {"num_return_sequences": 1, "use_cache": True}  # fields whose one right value is accepted
ADVICE = {
    "max_length": "Set 'max_new_tokens', the length of an answer.",
    "num_return_sequences": "An answer is one text: ask again with another 'seed', or set 'candidates'.",
    "eos_token_id": "Set 'stop_strings', texts after which an answer ends.",
    "penalty_alpha": "For the contrast with the prompt without its image set 'contrastive'.",
    "num_beam_groups": "Set 'num_beams' alone.",
    "diversity_penalty": "Set 'num_beams' alone.",
}


@dataclass(frozen=True)
class Decoding:
    """What one prompt is decoded with.

    The fields down to ``warpers`` may differ between the prompts of a batch; in the others they must agree.

    Attributes:
        max_new_tokens: the length of an answer, at most; None: what fits into the context.
        do_sample: sample the tokens; None: if a warper or a seed is given.
        seed: of the samples; None: torch's global generator draws one.
        stop_strings: texts after which an answer ends.
        cancelled: is called at every token; True ends the answer.
        warpers: temperature, top-k, top-p and the like (`WARPERS`), by name.
        candidates: how many answers are generated, of which a scorer selects one (`mllm.answering.rerank`).
        nearest_words: options of `mllm.answering.in_words`; None: visual tokens stay.
        parts: arguments of parts of the registry group ``decoding``, such as ``contrastive``, by name.
        processors: logits processors of `transformers`.
        generation: fields of `transformers.GenerationConfig` (`GENERATION`): beams, penalties, constraints.
        shorten: whether the answer is limited to what fits into the context: ``max_new_tokens`` is a default, and not
            what the caller asked for.
        prompt: the prompt's ids, which penalties count; below 0 at visual tokens. None: not known.

    Raises:
        MLLMError: a value that is not finite, out of range, or of another type.
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
    shorten: bool = field(default=False, compare=False)
    prompt: tuple[int, ...] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Check the values."""
        own = {name: getattr(self, name) for name in ("max_new_tokens", "do_sample", "seed", "stop_strings")}
        check_values({**own, "candidates": self.candidates, **self.warpers, **self.generation})

    @classmethod
    def of(cls, options: Mapping[str, Any], parts: Collection[str] = (), *, shorten: bool = False) -> Decoding:
        """Return the decoding that options describe.

        Args:
            options: by name: our fields, ``logits_processor``, parts, and fields of `transformers.GenerationConfig`.
            parts: the names of the registry group ``decoding``.
            shorten: see the attribute.

        Raises:
            MLLMError: an option that is unknown (the near matches are listed) or not supported, or an invalid value.
        """
        known = {*PER_ROW, *PER_BATCH, *WARPERS, *GENERATION, *parts, "logits_processor"}
        for name, value in options.items():
            if name not in known and not (name in NEUTRAL and value == NEUTRAL[name]):
                _refuse(name, known)
        given = {name: value for name, value in options.items() if value is not None}
        return cls(
            **{name: given[name] for name in (*PER_ROW, *PER_BATCH) if name in given},
            warpers={name: given[name] for name in WARPERS if name in given},
            parts={name: given[name] for name in parts if name in given},
            processors=tuple(given.get("logits_processor", ())),
            generation={name: given[name] for name in GENERATION if name in given},
            shorten=shorten,
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
    def selects(self) -> bool:
        """Whether answers to other prompts are generated, or several of which one is selected."""
        return self.candidates > 1 or self.nearest_words is not None

    @property
    def compares(self) -> bool:
        """Whether a scorer compares answers with the prompt's image, which a language model alone need not read."""
        return self.candidates > 1 or "guided" in self.parts

    @property
    def for_batch(self) -> tuple[Any, ...]:
        """Return the fields in which the prompts of a batch must agree."""
        return self.candidates, self.nearest_words, self.parts, self.processors, self.generation


def check_batch(decodings: Sequence[Decoding]) -> None:
    """Refuse decodings that cannot share a batch.

    Raises:
        MLLMError: rows that differ in what holds for a whole batch; or beams with a seed, with contrastive decoding,
            or with rows that are sampled differently.
    """
    first = decodings[0]
    if any(other.for_batch != first.for_batch for other in decodings):
        raise MLLMError(f"Prompts that are decoded together may differ in {', '.join((*PER_ROW, *WARPERS))} only.")
    if first.num_beams < 2:
        return
    if any(
        (other.samples, other.warpers, other.seed) != (first.samples, first.warpers, first.seed) for other in decodings
    ):
        raise MLLMError("Beam search samples all prompts of a batch alike: give all the same do_sample and warpers.")
    if first.seed is not None:
        raise MLLMError("A seed is for sampling without beams (num_beams=1).")
    if first.parts:
        raise MLLMError(f"{', '.join(first.parts)} decodes without beams: set num_beams=1, or leave it out.")


def _refuse(name: str, known: Collection[str]) -> None:
    if name in GenerationConfig().to_dict():
        advice = ADVICE.get(name, "Leave it out.")
        raise MLLMError(f"The decoding option {name!r} of transformers is not supported. {advice}")
    raise MLLMError(f"No decoding option is called {name!r}. {near(name, known)}")
