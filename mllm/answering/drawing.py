"""Draw images: a head's condition through the image decoder, the closest of several candidates first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mllm.capabilities import ConditionHead, RetrievalHead
from mllm.errors import MLLMError
from mllm.model import Model
from mllm.outputs import ImagePart
from mllm.prompts.pieces import Control, Piece
from mllm.readout.tokens import can_draw, image_tokens


@torch.no_grad()
def draw(model: Model, prompts: Sequence[Sequence[Piece]], count: int = 1, seed: int = 0) -> list[ImagePart]:
    """Return an image for each prompt, the best of ``count``, from the head's condition of the tokens after it.

    Raises:
        MLLMError: the model cannot draw, or a count below 1.
    """
    check_drawing(model)
    tokens = image_tokens(model)
    embeds, batch = model.prepare([[*prompt, Control("".join(tokens))] for prompt in prompts])
    states = model.lm.hidden(embeds, batch.mask)[:, -len(tokens) :]  # (B, r, D_lm)
    embeddings = model.lm.embed(batch.ids[:, -len(tokens) :])
    return draw_from_states(model, states, embeddings, count, [seed] * len(prompts))


@torch.no_grad()
def draw_from_states(
    model: Model, states: Tensor, embeddings: Tensor, count: int, seeds: Sequence[int]
) -> list[ImagePart]:
    """Return images of states and input embeddings ``(N, r, D_lm)`` at an image's tokens, the others as candidates.

    The first is the closest to the state at the retrieval head's token, if the model has that head.

    Args:
        model: the model.
        states: of the last layer.
        embeddings: of the tokens.
        count: images for each.
        seeds: of each one's first image; the next have the next seeds.

    Raises:
        MLLMError: a count below 1.
    """
    if count < 1:
        raise MLLMError(f"{count} images are asked for: expected 1 or more.")
    conditions = model.find(ConditionHead)(states, embeddings)
    drawings = []
    for state, condition, first in zip(states, conditions, seeds, strict=True):
        image_seeds = [first + number for number in range(count)]
        images = model.decoder.draw(condition.expand(count, -1, -1), image_seeds)
        scores = _similarities(model, state, images)
        source = model.decoder.label
        parts = [
            ImagePart(image, score=score, source=source, seed=seed)
            for image, score, seed in zip(images, scores, image_seeds, strict=True)
        ]
        best, *rest = sorted(parts, key=lambda part: -(part.score or 0.0))
        drawings.append(replace(best, candidates=tuple(rest)))
    return drawings


def _similarities(model: Model, state: Tensor, images: Sequence[Any]) -> list[float | None]:
    """Return the cosine of each image and the states ``(r, D_lm)``; None where the model has no retrieval head."""
    if not model.has(RetrievalHead) or model.encoder is None:
        return [None] * len(images)
    head = model.find(RetrievalHead)
    query = head.of_states(state[[image_tokens(model).index(head.tokens[0])]])  # (1, D)
    scores: list[float | None] = (head.of_features(model.features(images)) @ query[0]).tolist()
    return scores


def check_drawing(model: Model) -> None:
    """Raise an `MLLMError` for a model that cannot draw images."""
    if not can_draw(model):
        raise MLLMError(
            "This model makes no images: it needs a head that computes conditions, its tokens, and an image decoder "
            "(heads: [{type: generation}], tokens, decoder; docs/retrieval.md)."
        )
