"""Answers with images in them: where the model says its head's token, what is closest in an index is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllm.finder import of_prompts
from mllm.index import ImageIndex, hash_of, opened
from mllm.outputs import ImagePart, Output, Text
from mllm.prompt import Piece
from mllm.retrieval import HEAD, token_id
from mllm.sight import extended


class Eager:
    """Adds to the logit of a token, but for right behind one: below 0, images are rarer."""

    def __init__(self, token: int, bias: float) -> None:
        self._token, self._bias = token, bias

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores ``(B, V)`` of what follows ids ``(B, T)``."""
        scores = scores.clone()
        behind = ids[:, -1] == self._token if ids.shape[1] else torch.zeros(len(ids), dtype=torch.bool)
        scores[:, self._token] += self._bias * ~behind.to(scores.device)
        return scores


def retrieve(
    model: Any, prompts: Sequence[Sequence[Piece]], index: str | Path | ImageIndex, count: int
) -> list[list[ImagePart]]:
    """Return the images closest to each prompt: what the head makes of the token put behind it."""
    found = _fitting(model, index)
    return found.search(of_prompts(model, prompts), count)


@torch.no_grad()
def shown(
    model: Any,
    prompts: Sequence[Sequence[Piece]],
    settings: Sequence[dict[str, Any]],
    index: str | Path | ImageIndex,
    *,
    count: int,
    eager: float,
    streamer: Any = None,
) -> list[Output]:
    """Return answers as texts and images, each image with the next best ones, ``count`` in all."""
    found, token = _fitting(model, index), token_id(model)
    if eager:
        bias = Eager(token, eager)
        settings = [{**row, "logits_processor": [*row.get("logits_processor", []), bias]} for row in settings]
    embeds, batch = model.prepare(prompts)
    rows = model.lm.generate(batch.mask, settings, streamer=streamer, inputs_embeds=embeds)
    outputs = []
    for row, ids in enumerate(rows):
        places = [place for place, i in enumerate(ids) if i == token]
        images: list[ImagePart] = []
        if places:
            said = model.lm.embed(torch.tensor([ids], device=model.device))
            states = model.lm.hidden(*extended(embeds, row, batch.mask, said))[0]
            wanted = model.heads[HEAD].of_states(states[[batch.mask.shape[1] + place for place in places]])
            images = [replace(best, candidates=tuple(rest)) for best, *rest in found.search(wanted, count)]
        outputs.append(_put_together(model, ids, places, images))
    return outputs


def _put_together(model: Any, ids: Sequence[int], places: Sequence[int], images: Sequence[ImagePart]) -> Output:
    """Return the texts between the places of images, and the images there."""
    if not places:
        return Output([Text(model.lm.decode(ids).strip())])
    parts: list[Text | ImagePart] = []
    starts, ends = [0, *(place + 1 for place in places)], [*places, len(ids)]
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        text = model.lm.decode(ids[start:end])
        text = text.lstrip() if number == 0 else text
        text = text.rstrip() if number == len(places) else text
        parts += [Text(text)] if text else []
        parts += images[number : number + 1]
    return Output(parts)


def _fitting(model: Any, index: str | Path | ImageIndex) -> ImageIndex:
    """Return the index, held against the model."""
    token_id(model)
    found = opened(index)
    found.check(hash_of(model))
    return found
