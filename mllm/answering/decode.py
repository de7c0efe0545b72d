"""Decode prompts in one batch: make their `Decoding`, embed them, and return the generated tokens as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mllm.errors import renamed_options
from mllm.lms.decoding import Decoding, check_batch
from mllm.model import Model
from mllm.outputs import Output, Text
from mllm.prompts.formatting import formatted
from mllm.prompts.pieces import Control, Piece, without_images
from mllm.registry import lookup, made, table

FORMER = {"words": "nearest_words"}


def make_decoding(model: Model, options: Mapping[str, Any]) -> Decoding:
    """Return the decoding that the recipe's ``decoding`` describes with these options over it.

    Raises:
        MLLMError: an unknown option; the near matches are listed.
    """
    merged = {**renamed_options(model.spec.decoding, FORMER), **renamed_options(options, FORMER)}
    return Decoding.of(merged, table("decoding"))


def with_processors(model: Model, prompts: Sequence[Sequence[Piece]], decodings: Sequence[Decoding]) -> list[Decoding]:
    """Return decodings whose parts (``contrastive``) are logits processors for these prompts."""
    if not any(decoding.parts for decoding in decodings):
        return list(decodings)
    check_batch(decodings)
    processors = [
        made(lookup("decoding", name), f"decoding {name}", model, prompts, **options)
        for name, options in decodings[0].parts.items()
    ]
    return [replace(decoding, parts={}, processors=(*decoding.processors, *processors)) for decoding in decodings]


def generate_ids(
    model: Model, prompts: Sequence[Sequence[Piece]], decodings: Sequence[Decoding], mask: Any, **inputs: Any
) -> list[list[int]]:
    """Return the new ids of each prompt.

    Args:
        model: the model.
        prompts: interleaved prompts, which parts of the decoding read.
        decodings: of each prompt.
        mask: ``(B, T)`` of the inputs.
        inputs: the prompts as `mllm.lms.language_model.LanguageModel.generate` takes them, its cache and its streamer.
    """
    ids: list[list[int]] = model.lm.generate(mask, with_processors(model, prompts, decodings), **inputs)
    return ids


def answer(
    model: Model, prompts: Sequence[Sequence[Piece]], decodings: Sequence[Decoding], streamer: Any = None
) -> list[Output]:
    """Return the answer to each prompt, as text alone."""
    embeds, batch = model.prepare(prompts)
    rows = generate_ids(model, prompts, decodings, batch.mask, streamer=streamer, inputs_embeds=embeds)
    return [Output([Text(model.lm.decode(row).strip())]) for row in rows]


def image_free_prompt(model: Model, pieces: Sequence[Piece]) -> list[Piece]:
    """Return a prompt without its images; where nothing is left, with an end token, which starts a sequence."""
    if not without_images(pieces):
        pieces = formatted(model.spec.prompt, pieces)
    end = Control(model.lm.tokenizer.decode([model.lm.eos]))
    return without_images(pieces) or [end]
