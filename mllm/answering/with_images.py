"""Answers with images: where the model generates an image's tokens, one is retrieved from an index, or drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllm.answering.decode import finish_reason, for_prompts, generate_ids
from mllm.answering.drawing import draw_from_states
from mllm.answering.shared import started
from mllm.capabilities import DecisionHead, RetrievalHead
from mllm.errors import MLLMError
from mllm.lms.cross_attention import append_embeddings
from mllm.lms.decoding import Decoding
from mllm.model import Model
from mllm.outputs import ImagePart, Output, Text
from mllm.prompts.pieces import Piece
from mllm.readout.decision import decide
from mllm.readout.tokens import can_draw, image_tokens
from mllm.scorers.index import ImageIndex, hash_of, opened
from mllm.scorers.retrieval import of_prompts


class ImageTokenBias:
    """Adds a bias to the logit of an image's first token, and excludes it right after an image.

    What follows an image's tokens is not trained, and without text between them they would repeat without end.

    Args:
        tokens: ids of an image's tokens.
        bias: below 0 images are rarer.
    """

    def __init__(self, tokens: Sequence[int], bias: float) -> None:
        self._first, self._last, self._bias = tokens[0], tokens[-1], bias

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores ``(B, V)`` of the token after ids ``(B, T)``."""
        scores = scores.clone()
        scores[:, self._first] += self._bias
        if ids.shape[1]:
            scores[ids[:, -1] == self._last, self._first] = -torch.inf
        return scores


class ImageTokenSequence:
    """Forces an image's other tokens to follow the first one, in order, and excludes them elsewhere.

    Args:
        tokens: ids of an image's tokens.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = list(tokens)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores ``(B, V)`` of the token after ids ``(B, T)``."""
        scores = scores.clone()
        scores[:, self._tokens[1:]] = -torch.inf
        for token, following in pairwise(self._tokens):
            rows = ids[:, -1] == token if ids.shape[1] else torch.zeros(len(ids), dtype=torch.bool)
            scores[rows] = -torch.inf
            scores[rows, following] = 0.0
        return scores


def retrieve(
    model: Model, prompts: Sequence[Sequence[Piece]], index: str | Path | ImageIndex, count: int
) -> list[list[ImagePart]]:
    """Return the images closest to each prompt, by the retrieval head's vector of the token after it."""
    images = _open_index(model, index)
    return images.search(of_prompts(model, prompts), count)


@torch.no_grad()
def answer_with_images(
    model: Model,
    prompts: Sequence[Sequence[Piece]],
    decodings: Sequence[Decoding],
    index: str | Path | ImageIndex | None,
    *,
    count: int,
    image_logit_bias: float,
    streamer: Any = None,
) -> list[Output]:
    """Return answers as texts and images, each image with the next best ones, ``count`` in all.

    Images come from the index if there is one, else they are drawn; with an index and an image decoder the decision
    head chooses, if the model has one.

    Raises:
        MLLMError: there is no index and the model draws no images, or the index is another model's.
    """
    if index is None and not can_draw(model):
        raise MLLMError(
            "image_logit_bias raises or lowers how often images are shown, and there are none here: give an index that "
            "the model finds them in, or a model that makes them (docs/retrieval.md)."
        )
    image_index = None if index is None else _open_index(model, index)
    tokens = [model.lm.new_tokens[token] for token in image_tokens(model)]
    sequence = [ImageTokenSequence(tokens)] if len(tokens) > 1 else []
    processors = (*sequence, ImageTokenBias(tokens, image_logit_bias))
    decodings = for_prompts(model, prompts, decodings)
    embeds, batch = model.prepare(prompts)
    decodings = [replace(decoding, processors=(*decoding.processors, *processors)) for decoding in decodings]
    cache = started(model, batch, decodings)
    rows = generate_ids(model, prompts, decodings, batch.mask, streamer=streamer, cache=cache, inputs_embeds=embeds)
    outputs = []
    for row, ids in enumerate(rows):
        starts = [position for position, token in enumerate(ids) if token == tokens[0]]
        images: list[ImagePart] = []
        if starts:
            ids = [*ids[: starts[-1]], *tokens, *ids[starts[-1] + len(tokens) :]]  # the last may have been cut short
            answer = model.lm.embed(torch.tensor([ids], device=model.device))
            states = model.lm.hidden(*append_embeddings(embeds, row, batch.mask, answer))[0]
            at = torch.tensor([[start + step for step in range(len(tokens))] for start in starts])
            seed = decodings[row].seed or 0
            images = _images(model, image_index, states[batch.mask.shape[1] + at], answer[0][at], count, seed)
        reason = finish_reason(model, rows[row], decodings[row])
        outputs.append(Output(_composed(model, ids, starts, images), reason, len(rows[row])))
    return outputs


def _images(
    model: Model, index: ImageIndex | None, states: Tensor, embeddings: Tensor, count: int, seed: int
) -> list[ImagePart]:
    """Return an image for each of the states and embeddings ``(N, r, D_lm)`` at an image's tokens."""
    if index is None:
        decisions = ["generate"] * len(states)
    elif model.has(DecisionHead) and can_draw(model):
        decisions = decide(model, states[:, image_tokens(model).index(model.find(DecisionHead).tokens[0])])
    else:
        decisions = ["retrieve"] * len(states)
    images: list[ImagePart] = []
    for number, decision in enumerate(decisions):
        one = slice(number, number + 1)
        if decision == "generate":
            images += draw_from_states(model, states[one], embeddings[one], count, [seed + number * count])
            continue
        assert index is not None
        head = model.find(RetrievalHead)
        (best, *rest), *_ = index.search(head.of_states(states[one, image_tokens(model).index(head.tokens[0])]), count)
        images.append(replace(best, candidates=tuple(rest)))
    return images


def _composed(
    model: Model, ids: Sequence[int], starts: Sequence[int], images: Sequence[ImagePart]
) -> list[Text | ImagePart]:
    """Return the texts between the images that start at some of the ids, and the images."""
    if not starts:
        return [Text(model.lm.decode(ids).strip())]
    parts: list[Text | ImagePart] = []
    begins, ends = [0, *(start + 1 for start in starts)], [*starts, len(ids)]
    for number, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        text = model.lm.decode(ids[begin:end])
        text = text.lstrip() if number == 0 else text
        text = text.rstrip() if number == len(starts) else text
        parts += [Text(text)] if text else []
        parts += images[number : number + 1]
    return parts


def _open_index(model: Model, index: str | Path | ImageIndex) -> ImageIndex:
    """Return the index, checked to be the model's."""
    model.find(RetrievalHead)
    image_index = opened(index)
    image_index.check(hash_of(model))
    return image_index
