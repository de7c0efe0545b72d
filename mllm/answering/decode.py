"""Decode prompts in one batch: their settings, their embeddings, and the language model's new tokens as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mllm.model import Model
from mllm.outputs import Output, Text
from mllm.prompts.pieces import Piece
from mllm.registry import lookup, made, table


def decodings(model: Model, prompts: Sequence[Sequence[Piece]], given: Any) -> list[dict[str, Any]]:
    """Return each prompt's decoding settings: the recipe's own, what is given over them, its parts made.

    Args:
        prompts: what is answered.
        given: settings for all prompts, or a mapping for each.
    """
    rows = [given] * len(prompts) if isinstance(given, dict) else list(given)
    settings = [{**model.spec.decoding, **row} for row in rows]
    processors = [
        made(lookup("decoding", name), f"decoding {name}", model, prompts, **(settings[0][name] or {}))
        for name in table("decoding")
        if settings[0].get(name) is not None
    ]
    ours = {*table("decoding"), "candidates", "words"}
    plain = [{key: value for key, value in row.items() if key not in ours} for row in settings]
    if processors:
        plain = [{**row, "logits_processor": [*row.get("logits_processor", []), *processors]} for row in plain]
    return plain


def answer(
    model: Model, prompts: Sequence[Sequence[Piece]], settings: Sequence[dict[str, Any]], streamer: Any = None
) -> list[Output]:
    """Answer prompts with settings as `decodings` returns them, a mapping for each prompt."""
    embeds, batch = model.prepare(prompts)
    rows = model.lm.generate(batch.mask, settings, streamer=streamer, inputs_embeds=embeds)
    return [Output([Text(model.lm.decode(row).strip())]) for row in rows]
