"""Generate the answers of a batch with the ``generate`` of `transformers`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from mllm.errors import MLLMError
from mllm.lms.cross_attention import EmbeddingsWithMemory, using_memory
from mllm.lms.decoding import BEAMS, Decoding, check_batch
from mllm.lms.row_processors import PROCESSORS, Row, RowProcessors, active
from mllm.lms.runners.base import Group
from mllm.lms.runners.encoder_decoder import start_token
from mllm.lms.sampling import RowLimits, Sampler
from mllm.lms.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from mllm.lms.language_model import LanguageModel


def generate(
    lm: LanguageModel,
    mask: Tensor,
    decodings: Sequence[Decoding],
    *,
    cache: Any = None,
    streamer: Any = None,
    **inputs: Any,
) -> list[list[int]]:
    """Return the new ids of each sequence; see `mllm.lms.language_model.LanguageModel.generate`."""
    check_batch(decodings)
    rows = zip(decodings, mask.sum(1).tolist(), strict=True)
    decodings = [
        _with_ids(fitted(lm, decoding, length), row, mask, cache, inputs) for row, (decoding, length) in enumerate(rows)
    ]
    longest = max(decoding.max_new_tokens or 0 for decoding in decodings)
    groups = list(_groups(lm, mask, cache, inputs, separate=cache is None and exceeds(lm, mask.shape[1] + longest)))
    split = len(groups) > 1
    if split and decodings[0].processors:
        raise MLLMError(
            "Prompts of different lengths are decoded separately where a language model ignores masks or its context "
            "is short for them, and a logits processor of a whole batch (contrastive decoding) needs prompts of one "
            "length. Give them one by one."
        )
    by_row: dict[int, list[int]] = {}
    for group in groups:
        members = [decodings[row] for row in group.rows]
        with using_memory(group.memory):
            answers = _generate_group(lm, group, members, None if split else streamer)
        by_row |= zip(group.rows, answers, strict=True)
    answers = [by_row[row] for row in range(len(mask))]
    if split and streamer is not None:  # it takes one token of each row at a time
        stream_rows(streamer, answers, lm.eos)
    return answers


def room(lm: LanguageModel, length: int) -> int | None:
    """Return how many tokens an answer to a prompt of this length may have; None: there is no limit."""
    if lm.context is None:
        return None
    return lm.context - (1 if lm.model.config.is_encoder_decoder else length)  # a decoder of its own has a start token


def fitted(lm: LanguageModel, decoding: Decoding, length: int) -> Decoding:
    """Return a decoding whose answer to a prompt of this length fits into the context.

    Raises:
        MLLMError: ``max_new_tokens`` was asked for and does not fit, or it is None and nothing limits the answer.
    """
    left, wanted = room(lm, length), decoding.max_new_tokens
    if left is None:
        if wanted is None:
            raise MLLMError("This language model's context has no limit: set max_new_tokens, the length of an answer.")
        return decoding
    if left >= 1 and (wanted is None or decoding.shorten):
        return replace(decoding, max_new_tokens=left if wanted is None else min(wanted, left))
    if wanted is None or wanted > left:
        answer = "an answer" if wanted is None else f"an answer of up to {wanted} (max_new_tokens={wanted})"
        remedy = f"set max_new_tokens to {left} at most, or shorten the prompt" if left > 0 else "shorten the prompt"
        raise MLLMError(
            f"The prompt has {length} tokens, and {answer} does not fit after it: the language model's context is "
            f"{lm.context} tokens, of which {max(left, 0)} remain. {remedy[0].upper()}{remedy[1:]}."
        )
    return decoding


def exceeds(lm: LanguageModel, width: int) -> bool:
    """Whether a padded batch is wider than the context, which some models do not allow even if each row fits."""
    padded = lm.whole_batches and not lm.model.config.is_encoder_decoder
    return padded and lm.context is not None and width > lm.context


def _groups(lm: LanguageModel, mask: Tensor, cache: Any, inputs: dict[str, Any], *, separate: bool) -> Iterator[Group]:
    """Yield the rows that are decoded together; ``separate``: each alone, without its padding."""
    if not separate:
        yield from lm.runner.groups(mask, cache, **inputs)
        return
    for row in range(len(mask)):
        start = mask.shape[1] - int(mask[row].sum())  # padding is on the left
        own = {name: _row_from(value, row, start) for name, value in inputs.items()}
        for group in lm.runner.groups(mask[[row], start:], **own):
            yield group._replace(rows=[row])


def _row_from(value: Any, row: int, start: int) -> Any:
    """Return one row of inputs, from a position on."""
    if isinstance(value, EmbeddingsWithMemory):
        return EmbeddingsWithMemory(value.embeds[[row], start:], value.memory.rows([row]).starting_at(start))
    return value[[row], start:]


def _with_ids(decoding: Decoding, row: int, mask: Tensor, cache: Any, inputs: dict[str, Any]) -> Decoding:
    """Return a decoding that knows its prompt's ids, where the inputs are ids."""
    if decoding.prompt is not None or cache is not None or "input_ids" not in inputs:
        return decoding
    return replace(decoding, prompt=tuple(inputs["input_ids"][row][mask[row].bool()].tolist()))


def stream_rows(streamer: Any, rows: Sequence[Sequence[int]], eos: int) -> None:
    """Send a streamer answers that are complete already, token by token."""
    streamer.put(torch.empty(len(rows), 0, dtype=torch.long))  # the prompt
    for index in range(max(map(len, rows)) + 1):
        streamer.put(torch.tensor([ids[index] if index < len(ids) else eos for ids in rows]))
    streamer.end()


def _generate_group(lm: LanguageModel, group: Group, decodings: Sequence[Decoding], streamer: Any) -> list[list[int]]:
    """Return the new ids of rows that run together."""
    first, model, text = decodings[0], lm.runner.model, lm.text
    options = {**model_defaults(model), **first.generation}
    processors: list[Any] = [*first.processors]
    if constraints := active(options):
        rows = [_row(lm, decoding, options) for decoding in decodings]
        processors.insert(0, RowProcessors(constraints, rows, start=group.start))
    if first.num_beams == 1 and any(decoding.samples for decoding in decodings):
        processors.append(Sampler(decodings))
    others = {name: value for name, value in options.items() if name not in PROCESSORS}
    if model.config.is_encoder_decoder:
        others["decoder_start_token_id"] = start_token(model)
    config = _config(decodings, others, text)
    limits = RowLimits(decodings, start=group.start, tokenizer=text.tokenizer)
    out = _without_defaults(model).generate(
        generation_config=config,
        streamer=streamer,
        logits_processor=LogitsProcessorList(processors),
        stopping_criteria=StoppingCriteriaList([limits]),
        **{name: _for_beams(value, len(decodings), first.num_beams) for name, value in group.inputs.items()},
    )
    new = out[:, group.start :].tolist()
    return [answer_ids(text, ids)[: decoding.max_new_tokens] for ids, decoding in zip(new, decodings, strict=True)]


def answer_ids(text: TextTokenizer, ids: list[int]) -> list[int]:
    """Return the ids of an answer, without its end and the padding after it."""
    ids = text.until_end(ids)
    while ids and ids[-1] == text.pad:
        ids = ids[:-1]
    return ids


def _for_beams(value: Any, rows: int, beams: int) -> Any:
    """Return an argument of ``generate``, which repeats tensors for the beams, and no KV cache."""
    if beams > 1 and isinstance(value, Cache):
        value.reorder_cache(cast(Any, torch.arange(rows).repeat_interleave(beams)))
    return value


def _row(lm: LanguageModel, decoding: Decoding, options: dict[str, Any]) -> Row:
    """Return what penalties and constraints of a prompt are made for.

    Raises:
        MLLMError: the prompt's ids are not known.
    """
    if decoding.prompt is None:
        raise MLLMError("Penalties and constraints count the prompt's ids: give Decoding.prompt.")
    device = lm.runner.model.device
    ids = encoder_ids = torch.tensor([decoding.prompt], dtype=torch.long, device=device)
    if lm.model.config.is_encoder_decoder:
        end = torch.tensor([lm.text.end_of_text], dtype=torch.long, device=device)
        encoder_ids, ids = torch.cat([ids, end], dim=1), torch.tensor([[start_token(lm.model)]], device=device)
    start = ids.shape[1]
    begin = start + int(start == 1 and options.get("forced_bos_token_id") is not None)
    return Row(ids, encoder_ids, lm.text.ends, begin, start + int(decoding.max_new_tokens or 0))


def model_defaults(model: Any) -> dict[str, Any]:
    """Return the options of beams and constraints that a model's ``generation_config.json`` sets."""
    values = {name: getattr(model.generation_config, name, None) for name in (*BEAMS, *PROCESSORS)}
    return {name: value for name, value in values.items() if value is not None and name != "num_beams"}


def _without_defaults(model: Any) -> Any:
    """Return the model, all of it shared, with a ``generation_config`` that fills in no options.

    They are complete without it. The model itself stays as it is, for other threads.
    """
    bare = copy.copy(model)
    bare.generation_config = GenerationConfig()
    return bare


def _config(decodings: Sequence[Decoding], options: dict[str, Any], text: TextTokenizer) -> GenerationConfig:
    """Return the configuration of a batch; `RowProcessors`, `RowLimits` and `Sampler` apply the options of rows."""
    first = decodings[0]
    sampled_beams = first.num_beams > 1 and first.samples
    return GenerationConfig(
        **{
            "num_beams": 1,
            "do_sample": sampled_beams,
            "eos_token_id": text.ends,
            "pad_token_id": text.pad,
            "max_new_tokens": max(decoding.max_new_tokens or 0 for decoding in decodings),
            **(first.warpers if sampled_beams else {}),
            **options,
        }
    )
