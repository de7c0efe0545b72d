"""Decode prompts in one batch: make their `Decoding`, embed them, and return the generated tokens as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Literal

from mllm.answering.shared import started
from mllm.capabilities import RunsOnEngine
from mllm.config.parts import KINDS
from mllm.errors import MLLMError, renamed_options
from mllm.lms.decoding import Decoding, check_batch
from mllm.lms.generation import fitted, room
from mllm.model import Model
from mllm.outputs import Output, Text
from mllm.prompts.batch import Encoded
from mllm.prompts.formatting import formatted
from mllm.prompts.pieces import Control, Piece, answer_text, without_images
from mllm.registry import lookup, made, table

FORMER = {"words": "nearest_words"}


def make_decoding(model: Model, options: Mapping[str, Any]) -> Decoding:
    """Return the decoding that the recipe's ``decoding`` describes with these options over it.

    Args:
        model: the model.
        options: by name. ``kind``: ``caption`` or ``question``, whose own options in the recipe are over the others.

    The recipe's ``max_new_tokens`` is a default: where the context ends before, the answer is as long as fits.

    Raises:
        MLLMError: an option that is unknown (the near matches are listed) or not supported, or an invalid value.
    """
    kind = options.get("kind")
    if kind not in (None, *KINDS):
        raise MLLMError(f"The decoding option 'kind' is {kind!r}; expected {' or '.join(KINDS)}.")
    over = _of_kind({name: value for name, value in options.items() if name != "kind"}, kind)
    merged = {**_of_kind(model.spec.decoding, kind), **over}
    decoding = Decoding.of(merged, table("decoding"), shorten=over.get("max_new_tokens") is None)
    if isinstance(model.lm, RunsOnEngine):
        model.lm.check(decoding)
    return decoding


def _of_kind(options: Mapping[str, Any], kind: str | None) -> dict[str, Any]:
    """Return the options of one kind of answer: its own over those of all kinds."""
    shared = {name: value for name, value in options.items() if name not in KINDS}
    return {**renamed_options(shared, FORMER), **renamed_options(options.get(kind or "", {}), FORMER)}


def for_prompts(
    model: Model, prompts: Sequence[Sequence[Piece]], decodings: Sequence[Decoding], names: Sequence[str] = ()
) -> list[Decoding]:
    """Return each prompt's decoding with its ids, and with a ``max_new_tokens`` that fits into the context.

    Args:
        model: the model.
        prompts: interleaved prompts.
        decodings: of each prompt.
        names: of the prompts, for errors; none: their numbers.

    Raises:
        MLLMError: a prompt that is too long, alone or with its answer; of several prompts it is named.
    """
    names = names or [f"Prompt {number}" for number in range(len(prompts))]
    made = []
    for name, prompt, decoding in zip(names, prompts, decodings, strict=True):
        try:
            made.append(for_encoded(model, model.encode(prompt), decoding))
        except MLLMError as error:
            raise MLLMError(f"{name}: {error}" if len(prompts) > 1 else str(error)) from None
    return made


def for_encoded(model: Model, encoded: Encoded, decoding: Decoding) -> Decoding:
    """Return a decoding with its prompt's ids, and with a ``max_new_tokens`` that fits into the context.

    Raises:
        MLLMError: the answer does not fit.
    """
    ids = [-1 if visual else token for token, visual in zip(encoded.ids, encoded.visual, strict=True)]
    return replace(fitted(model.lm, decoding, len(ids)), prompt=tuple(ids))


def candidate_ids(lm: Any, candidate: str) -> list[int]:
    """Return the ids of a candidate as the whole answer: with the space before it, as in training, and its end."""
    return [*lm.tokenize(answer_text(candidate)), lm.eos]


def check_scoring(lm: Any) -> None:
    """Refuse log-likelihoods of a language model whose layers an engine runs.

    Raises:
        MLLMError: an engine runs them: it returns tokens, and no log-probabilities of prompts that are embeddings.
    """
    if isinstance(lm, RunsOnEngine):
        raise MLLMError(
            "An engine returns tokens, and no log-likelihoods of given answers after prompts that are embeddings "
            "(scores, the answer modes choose, order and match). Use engine: transformers."
        )


def check_candidates(lm: Any, length: int, candidates: Sequence[str]) -> None:
    """Check that each candidate fits into the context after a prompt of a length.

    Raises:
        MLLMError: one does not; it is named.
    """
    left = room(lm, length)
    for candidate in candidates:
        tokens = len(candidate_ids(lm, candidate))
        if left is not None and tokens > left:
            raise MLLMError(
                f"The prompt has {length} tokens and the candidate {candidate[:40]!r} {tokens}, its end included: the "
                f"language model's context is {lm.context} tokens, of which {max(left, 0)} remain. Shorten one of them."
            )


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
        decodings: of each prompt, made by `for_prompts`.
        mask: ``(B, T)`` of the inputs.
        inputs: the prompts as `mllm.lms.language_model.LanguageModel.generate` takes them, its cache and its streamer.
    """
    ids: list[list[int]] = model.lm.generate(mask, with_processors(model, prompts, decodings), **inputs)
    return ids


def answer(
    model: Model,
    prompts: Sequence[Sequence[Piece]],
    decodings: Sequence[Decoding],
    streamer: Any = None,
    features: Any = None,
) -> list[Output]:
    """Return the answer to each prompt, as text alone; ``features`` are those of their images, if they are known."""
    decodings = for_prompts(model, prompts, decodings)
    embeds, batch = model.prepare(prompts, features)
    cache = started(model, batch, decodings)
    rows = generate_ids(model, prompts, decodings, batch.mask, streamer=streamer, cache=cache, inputs_embeds=embeds)
    return [output_of(model, ids, decoding) for ids, decoding in zip(rows, decodings, strict=True)]


def submitted(
    model: Model,
    prompts: Sequence[Sequence[Piece]],
    decodings: Sequence[Decoding],
    puts: Sequence[Callable[[list[int]], Any]],
) -> list[tuple[Future[list[int]], Decoding]]:
    """Queue prompts at the model's engine, and return a future of each one's ids, and its decoding.

    Args:
        model: a model with an engine (`mllm.capabilities.RunsOnEngine`).
        prompts: interleaved prompts.
        decodings: of each prompt.
        puts: are called with each answer's new ids as they are generated.
    """
    decodings = for_prompts(model, prompts, decodings)
    embeds, batch = model.prepare(prompts)
    futures = model.lm.submit(batch.mask, decodings, puts=puts, inputs_embeds=embeds)
    return list(zip(futures, decodings, strict=True))


def output_of(model: Model, ids: Sequence[int], decoding: Decoding) -> Output:
    """Return an answer of ids, as text alone."""
    return Output([Text(model.lm.decode(ids).strip())], finish_reason(model, ids, decoding), len(ids))


def finish_reason(model: Model, ids: Sequence[int], decoding: Decoding) -> Literal["stop", "length"]:
    """Return why an answer ended: ``stop``, or ``length`` where it has as many tokens as it may have."""
    stops = [decoding.stop_strings] if isinstance(decoding.stop_strings, str) else decoding.stop_strings or ()
    if decoding.max_new_tokens is None or len(ids) < decoding.max_new_tokens:
        return "stop"
    text = model.lm.decode(ids)
    return "stop" if any(stop in text for stop in stops) else "length"


def image_free_prompt(model: Model, pieces: Sequence[Piece]) -> list[Piece]:
    """Return a prompt without its images; where nothing is left, with an end token, which starts a sequence."""
    if not without_images(pieces):
        pieces = formatted(model.spec.prompt, pieces)
    end = Control(model.lm.tokenizer.decode([model.lm.eos]))
    return without_images(pieces) or [end]
