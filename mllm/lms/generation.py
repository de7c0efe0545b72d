"""Generate the answers of a batch with the ``generate`` of `transformers`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from mllm.errors import MLLMError
from mllm.lms.cross_attention import using_memory
from mllm.lms.decoding import Decoding, check_batch
from mllm.lms.runners.base import Group, Runner
from mllm.lms.sampling import RowLimits, Sampler
from mllm.lms.tokenizer import TextTokenizer


def generate(
    runner: Runner,
    text: TextTokenizer,
    mask: Tensor,
    decodings: Sequence[Decoding],
    *,
    cache: Any = None,
    streamer: Any = None,
    **inputs: Any,
) -> list[list[int]]:
    """Return the new ids of each sequence; see `mllm.lms.language_model.LanguageModel.generate`."""
    check_batch(decodings)
    groups = list(runner.groups(mask, cache, **inputs))
    split = len(groups) > 1
    if split and decodings[0].processors:
        raise MLLMError(
            "This language model ignores masks, so prompts of different lengths are decoded separately, and a logits "
            "processor of a whole batch (contrastive decoding) needs prompts of one length. Give them one by one."
        )
    by_row: dict[int, list[int]] = {}
    for group in groups:
        members = [decodings[row] for row in group.rows]
        with using_memory(group.memory):
            answers = _generate_group(runner, text, group, members, None if split else streamer)
        by_row |= zip(group.rows, answers, strict=True)
    rows = [by_row[row] for row in range(len(mask))]
    if split and streamer is not None:  # it takes one token of each row at a time
        _stream(streamer, rows, text.eos)
    return rows


def _stream(streamer: Any, rows: Sequence[list[int]], eos: int) -> None:
    """Send a streamer answers that are complete already, token by token."""
    streamer.put(torch.empty(len(rows), 0, dtype=torch.long))  # the prompt
    for index in range(max(map(len, rows)) + 1):
        streamer.put(torch.tensor([ids[index] if index < len(ids) else eos for ids in rows]))
    streamer.end()


def _generate_group(
    runner: Runner, text: TextTokenizer, group: Group, decodings: Sequence[Decoding], streamer: Any
) -> list[list[int]]:
    """Return the new ids of rows that run together."""
    first = decodings[0]
    beams = first.num_beams > 1
    processors = list(first.processors)
    if not beams and any(decoding.samples for decoding in decodings):
        processors.append(Sampler(decodings))
    limits = [decoding.max_new_tokens for decoding in decodings]
    ends = [] if beams else [RowLimits(decodings, start=group.start, tokenizer=text.tokenizer)]
    out = runner.model.generate(
        generation_config=_config(decodings, text),
        streamer=streamer,
        logits_processor=LogitsProcessorList(processors),
        stopping_criteria=StoppingCriteriaList(ends),
        tokenizer=text.tokenizer if beams and first.stop_strings else None,
        **group.inputs,
    )
    new = out[:, group.start :].tolist()
    return [text.until_end(ids)[:limit] for ids, limit in zip(new, limits, strict=True)]


def _config(decodings: Sequence[Decoding], text: TextTokenizer) -> GenerationConfig:
    """Return the configuration of a batch; without beams, `RowLimits` and `Sampler` apply the options of rows."""
    first = decodings[0]
    options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "eos_token_id": text.ends, "pad_token_id": text.pad}
    options |= first.generation
    if first.num_beams > 1:
        ours = {
            "max_new_tokens": first.max_new_tokens,
            "do_sample": first.do_sample,
            "stop_strings": first.stop_strings,
            **first.warpers,
        }
        return GenerationConfig(**{**options, **{name: value for name, value in ours.items() if value is not None}})
    limits = [decoding.max_new_tokens for decoding in decodings]
    options["max_new_tokens"] = None if None in limits else max(limit or 0 for limit in limits)
    return GenerationConfig(**options)
