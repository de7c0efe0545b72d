"""Answers with images in them: where the model says an image's tokens, one is found in an index, or made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllm.answering.drawing import drawn
from mllm.capabilities import DecisionHead, RetrievalHead
from mllm.errors import MLLMError
from mllm.lms.cross_attention import extended
from mllm.outputs import ImagePart, Output, Text
from mllm.prompts.pieces import Piece
from mllm.readout.decision import decide
from mllm.readout.tokens import can_draw, image_tokens
from mllm.scorers.index import ImageIndex, hash_of, opened
from mllm.scorers.retrieval import of_prompts


class Eager:
    """Adds to the logit of an image's first token: below 0, images are rarer. None stands right behind another.

    What follows an image's tokens was never learnt, and without words between them they go on for ever.
    """

    def __init__(self, tokens: Sequence[int], bias: float) -> None:
        self._first, self._last, self._bias = tokens[0], tokens[-1], bias

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores ``(B, V)`` of what follows ids ``(B, T)``."""
        scores = scores.clone()
        scores[:, self._first] += self._bias
        if ids.shape[1]:
            scores[ids[:, -1] == self._last, self._first] = -torch.inf
        return scores


class Whole:
    """Lets an image's tokens follow its first one, in order, and stand nowhere else."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = list(tokens)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores ``(B, V)`` of what follows ids ``(B, T)``."""
        scores = scores.clone()
        scores[:, self._tokens[1:]] = -torch.inf
        for token, following in pairwise(self._tokens):
            rows = ids[:, -1] == token if ids.shape[1] else torch.zeros(len(ids), dtype=torch.bool)
            scores[rows] = -torch.inf
            scores[rows, following] = 0.0
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
    index: str | Path | ImageIndex | None,
    *,
    count: int,
    eager: float,
    streamer: Any = None,
) -> list[Output]:
    """Return answers as texts and images, each image with the next best ones, ``count`` in all.

    Images come from the index where there is one, else they are made; with both, as the decision head says, if the
    model has one.

    Raises:
        MLLMError: there is no index and the model makes no images, or the index is another model's.
    """
    if index is None and not can_draw(model):
        raise MLLMError(
            "Eager is how readily images are shown, and there are none here: give an index that the model finds them "
            "in, or a model that makes them (docs/retrieval.md)."
        )
    found = None if index is None else _fitting(model, index)
    tokens = [model.lm.new_tokens[token] for token in image_tokens(model)]
    ours = [*([Whole(tokens)] if len(tokens) > 1 else []), Eager(tokens, eager)]
    settings = [{**row, "logits_processor": [*row.get("logits_processor", []), *ours]} for row in settings]
    embeds, batch = model.prepare(prompts)
    rows = model.lm.generate(batch.mask, settings, streamer=streamer, inputs_embeds=embeds)
    outputs = []
    for row, ids in enumerate(rows):
        places = [place for place, i in enumerate(ids) if i == tokens[0]]
        images: list[ImagePart] = []
        if places:
            ids = [*ids[: places[-1]], *tokens, *ids[places[-1] + len(tokens) :]]  # the last may have been cut short
            said = model.lm.embed(torch.tensor([ids], device=model.device))
            states = model.lm.hidden(*extended(embeds, row, batch.mask, said))[0]
            at = torch.tensor([[place + step for step in range(len(tokens))] for place in places])
            seed = settings[row].get("seed") or 0
            images = _images(model, found, states[batch.mask.shape[1] + at], said[0][at], count, seed)
        outputs.append(_put_together(model, ids, places, images))
    return outputs


def _images(
    model: Any, index: ImageIndex | None, states: Tensor, embeddings: Tensor, count: int, seed: int
) -> list[ImagePart]:
    """Return an image for each of the states and embeddings ``(N, r, D_lm)`` at an image's tokens."""
    if index is None:
        ways = ["generate"] * len(states)
    elif model.has(DecisionHead) and can_draw(model):
        ways = decide(model, states[:, image_tokens(model).index(model.find(DecisionHead).tokens[0])])
    else:
        ways = ["retrieve"] * len(states)
    images: list[ImagePart] = []
    for number, way in enumerate(ways):
        one = slice(number, number + 1)
        if way == "generate":
            images += drawn(model, states[one], embeddings[one], count, [seed + number * count])
            continue
        assert index is not None
        head = model.find(RetrievalHead)
        (best, *rest), *_ = index.search(head.of_states(states[one, image_tokens(model).index(head.tokens[0])]), count)
        images.append(replace(best, candidates=tuple(rest)))
    return images


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
    model.find(RetrievalHead)
    found = opened(index)
    found.check(hash_of(model))
    return found
