"""Translate decoding options into vLLM's sampling parameters, one to one; the others are refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mllm.errors import MLLMError
from mllm.lms.decoding import Decoding
from mllm.lms.row_processors import active
from mllm.lms.sampling import NEUTRAL

WARPERS = ("temperature", "top_p", "top_k", "min_p")  # that vLLM has, under the same names
WITHOUT = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}  # their values that change nothing
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of LoRAs, that vLLM makes room for
COLDEST = 0.01  # a temperature, 0 aside
INSTEAD = "Leave it out, or answer with engine: transformers."
REASONS = {
    "num_beams": "vLLM has no beam search over prompts that are embeddings",
    "repetition_penalty": "it counts the prompt's ids, which vLLM does not have of embeddings",
}


def check_options(decoding: Decoding) -> None:
    """Refuse a decoding that vLLM cannot be given.

    Raises:
        MLLMError: an option that it does not have, or has with another meaning.
    """
    constraints = {name: value for name, value in active(decoding.generation).items() if name != "min_new_tokens"}
    warpers = _changing(decoding)
    refused = [name for name in warpers if name not in WARPERS]
    refused += ["num_beams"] if decoding.num_beams > 1 else []
    refused += [*constraints, *decoding.parts]
    refused += ["max_time"] if decoding.generation.get("max_time") is not None else []
    refused += ["logits_processor"] if decoding.processors else []
    if refused:
        reason = REASONS.get(refused[0], "vLLM has no such option, or has it with another meaning")
        raise MLLMError(f"The engine vllm does not take the decoding option {refused[0]!r}: {reason}. {INSTEAD}")
    if 0 < warpers.get("temperature", 1.0) < COLDEST:
        raise MLLMError(
            f"The engine vllm raises a 'temperature' below {COLDEST:g} to it: give 0 (greedy), or at least {COLDEST:g}."
        )
    if "min_p" in warpers and "top_p" in warpers:
        raise MLLMError(
            "The engine vllm applies 'min_p' before 'top_p', and transformers after it: give one of them, or answer "
            "with engine: transformers."
        )


def sampling_of(decoding: Decoding, ends: Sequence[int]) -> dict[str, Any]:
    """Return the arguments of vLLM's ``SamplingParams``, which are fields of its completions API too.

    All that would otherwise have a default of the model's ``generation_config.json`` is given.

    Args:
        decoding: what `check_options` accepts.
        ends: the ids that end an answer.
    """
    stops = [decoding.stop_strings] if isinstance(decoding.stop_strings, str) else list(decoding.stop_strings or ())
    warpers = {**WITHOUT, **_changing(decoding)}
    greedy = not decoding.samples or not warpers["top_p"]
    if greedy:
        warpers = {**WITHOUT, "temperature": 0.0}
    return {
        **warpers,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_tokens": decoding.max_new_tokens,
        "min_tokens": int(decoding.generation.get("min_new_tokens") or 0),
        "seed": None if greedy or decoding.seed is None else decoding.seed % 2**63,
        "stop": stops,
        "stop_token_ids": list(ends),
        "ignore_eos": True,  # the ends are all that ends an answer
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,  # a stop string may be a control word
    }


def rank_for(rank: int) -> int:
    """Return the rank that vLLM has to make room for, for a LoRA of this rank."""
    return next((largest for largest in RANKS if largest >= rank), rank)


def _changing(decoding: Decoding) -> dict[str, Any]:
    """Return the warpers that change something."""
    if not decoding.samples:
        return {}
    return {name: value for name, value in decoding.warpers.items() if value != NEUTRAL.get(name)}
