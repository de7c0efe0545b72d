"""Check the values of decoding options: finite numbers in their ranges, of the right types."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from mllm.errors import MLLMError

SMALLEST, LARGEST = 1e-5, 1e5  # of what logits are divided by: float32 overflows far beyond
LONGEST = 2**31 - 1
Check = tuple[Callable[[Any], bool], str]  # whether a value is right, and what is expected


def _whole(low: int, high: int = LONGEST) -> Check:
    expected = f"a whole number of at least {low}" if high == LONGEST else f"a whole number from {low} to {high}"
    return lambda value: _is(Integral, value) and low <= value <= high, expected


def _number(low: float, high: float) -> Check:
    return lambda value: _is(Real, value) and low <= value <= high, f"a number from {low:g} to {high:g}"


def _below(high: float) -> Check:
    return lambda value: _is(Real, value) and 0 <= value < high, f"a number from 0 to less than {high:g}"


def _is(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)  # type: ignore[arg-type]


def _is_ids(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(map(_ID[0], value))


def _is_temperature(value: Any) -> bool:
    return _is(Real, value) and (value == 0 or SMALLEST <= value <= LARGEST)


def _is_stops(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return isinstance(texts, Sequence) and all(isinstance(text, str) and text for text in texts)


def _is_decay(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and _whole(0)[0](value[0]) and _SCALE[0](value[1])


def _is_bias(value: Any) -> bool:
    pairs = value.items() if isinstance(value, Mapping) else value
    return isinstance(value, Mapping | Sequence) and all(
        isinstance(pair, Sequence) and len(pair) == 2 and _is_ids(pair[0]) and pair[0] and _number(-1e30, 1e30)[0](pair[1])
        for pair in map(list, pairs)
    )


_ID = _whole(0)
_SCALE = _number(SMALLEST, LARGEST)
_SHARE = _number(0, 1)
_FLAG: Check = (lambda value: isinstance(value, bool), "true or false")
_IDS: Check = (_is_ids, "a list of token ids")

CHECKS: dict[str, Check] = {
    "max_new_tokens": _whole(1),
    "do_sample": _FLAG,
    "seed": _whole(-(2**63), 2**64 - 1),
    "stop_strings": (_is_stops, "a text or a list of texts, none of them empty"),
    "candidates": _whole(1),
    "temperature": (_is_temperature, f"0 (greedy), or a number from {SMALLEST:g} to {LARGEST:g}"),
    "top_k": _whole(0),
    "top_p": _SHARE,
    "min_p": _SHARE,
    "typical_p": (lambda value: _is(Real, value) and 0 < value <= 1, "a number above 0, up to 1"),
    "epsilon_cutoff": _below(1),
    "eta_cutoff": _below(1),
    "num_beams": _whole(1),
    "length_penalty": _number(-10, 10),
    "early_stopping": (lambda value: isinstance(value, bool) or value == "never", "true, false or 'never'"),
    "renormalize_logits": _FLAG,
    "repetition_penalty": _SCALE,
    "encoder_repetition_penalty": _SCALE,
    "no_repeat_ngram_size": _whole(0),
    "encoder_no_repeat_ngram_size": _whole(0),
    "min_length": _whole(0),
    "min_new_tokens": _whole(0),
    "bad_words_ids": (
        lambda value: isinstance(value, Sequence) and bool(value) and all(_is_ids(ids) and ids for ids in value),
        "lists of token ids, none of them empty",
    ),
    "sequence_bias": (_is_bias, "pairs of a list of token ids and a finite bias"),
    "forced_bos_token_id": _ID,
    "forced_eos_token_id": (lambda value: _ID[0](value) or _is_ids(value), "a token id, or a list of them"),
    "remove_invalid_values": _FLAG,
    "exponential_decay_length_penalty": (_is_decay, "a number of tokens and a factor"),
    "suppress_tokens": _IDS,
    "begin_suppress_tokens": _IDS,
    "max_time": (lambda value: _is(Real, value) and value > 0, "a number of seconds above 0"),
}


def check_values(options: Mapping[str, Any]) -> None:
    """Refuse values of decoding options that cannot be right; None is no value.

    Raises:
        MLLMError: a value that is not finite, out of range, or of another type.
    """
    for name, value in options.items():
        is_right, expected = CHECKS[name]
        try:
            right = value is None or is_right(value)
        except (TypeError, ValueError):
            right = False
        if not right:
            raise MLLMError(f"The decoding option {name!r} is {value!r}; expected {expected}.")
