"""Read the fields of a request: null means left out, and what would change the answer is done or refused by name."""

from __future__ import annotations

import json
from typing import Any

from mllm.errors import near
from mllm.serve.schema import Completion, Refused, invalid_request

IGNORED = {  # fields of OpenAI's schema that do not change an answer here
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
UNSUPPORTED: dict[str, tuple[Any, ...]] = {  # fields of OpenAI's schema that would, and their values that would not
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
MAX_MARKS = 250_000  # brackets and commas of a body, which become objects of some 80 bytes each


def read_completion(body: bytes | bytearray) -> Completion:
    """Return a request for a chat completion.

    Raises:
        Refused: it is not JSON, has text that is not Unicode, or a field that is unknown, not supported or invalid.
    """
    if (marks := sum(map(body.count, (b"[", b"{", b",")))) > MAX_MARKS:
        raise invalid_request(f"The body has {marks} brackets and commas; at most {MAX_MARKS} are read. Shorten it.")
    try:
        values = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"The body is not JSON: {error}.", "invalid_request") from None
    if not isinstance(values, dict):
        raise invalid_request("The body is not a JSON object: expected {'messages': [...]}.")
    given = {name: value for name, value in values.items() if value is not None and name not in IGNORED}
    for name, value in given.items():
        _check_field(name, value)
        _check_text(name, value)
    return Completion.checked({name: value for name, value in given.items() if name not in UNSUPPORTED})


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def _check_field(name: str, value: Any) -> None:
    if name in UNSUPPORTED and value not in UNSUPPORTED[name]:
        expected = " or ".join(json.dumps(neutral) for neutral in UNSUPPORTED[name])
        advice = f"expected {expected}, or no such field" if expected else "leave it out"
        raise invalid_request(f"{name}: {json.dumps(value)[:80]} is not supported; {advice}.", name)
    if name not in UNSUPPORTED and name not in Completion.model_fields:
        known = {*Completion.model_fields, *UNSUPPORTED, *IGNORED}
        shown = ascii(name)[1:-1][:80]
        raise invalid_request(f"{shown}: there is no such field. {near(shown, known)}", shown)


def _check_text(name: str, value: Any) -> None:
    """Refuse text with a lone surrogate, which no tokenizer and no answer can have."""
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, dict):
            waiting += [*inner.keys(), *inner.values()]
        elif isinstance(inner, list):
            waiting += inner
        elif isinstance(inner, str) and not inner.isascii():
            try:
                inner.encode()
            except UnicodeEncodeError as error:
                code = f"\\u{ord(inner[error.start]):04x}"
                raise invalid_request(
                    f"{name}: the text has a lone surrogate, {code}, which is no character. Send valid Unicode.", name
                ) from None
