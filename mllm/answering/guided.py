"""Guided decoding: weigh the likeliest next tokens by how similar a scorer finds the text with them and the image.

This is MAGIC's search (arXiv:2205.02655): it takes no gradient. A weighted sum of the scorer's vectors of images and
texts may stand in the place of an image (ZeroCap's arithmetic, arXiv:2111.14447).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import LogitsProcessor

from mllm.errors import MLLMError
from mllm.media.images import source_of
from mllm.model import Model
from mllm.prompts.pieces import Piece, images_of
from mllm.registry import Count, NonNegative, Positive
from mllm.slots import Scorer

PROMPT = "prompt"  # stands for the prompt's last image


class Guided(LogitsProcessor):
    """Choose among the k likeliest tokens by their probability plus a weighted similarity.

    The similarity of a token is that of the image and the answer with the token, divided by a temperature, as a softmax
    over the k tokens. All others are excluded. Options such as ``repetition_penalty`` are applied before.

    Args:
        model: the model; its scorer compares.
        prompts: one for each row.
        k: how many tokens are compared.
        weight: of the similarities; 0: the language model alone.
        temperature: divides the cosines.
        of: what the answer is compared with: mappings of ``image`` (``prompt``: the prompt's last image; or another) or
            ``text``, and ``weight`` (1 by default), whose vectors are summed; None: the prompt's last image.

    Raises:
        MLLMError: a prompt without an image that is compared with, or another form of ``of``.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Sequence[Piece]],
        *,
        k: Count = 45,
        weight: NonNegative = 2.0,
        temperature: Positive = 0.01,
        of: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self._lm, self._scorer = model.lm, model.scorer
        self._k, self._weight, self._temperature = int(k), weight, temperature
        members = [{"image": PROMPT}] if of is None else of
        self._queries = [_query(self._scorer, prompt, members) for prompt in prompts]
        self._answers: list[list[int]] = [[] for _ in prompts]
        self._started = False

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores ``(B, V)``: logarithms of the weighted sums."""
        if self._started:
            for answer, token in zip(self._answers, input_ids[:, -1].tolist(), strict=True):
                answer.append(token)
        self._started = True
        rows = zip(self._answers, self._queries, scores.float(), strict=True)
        return torch.stack([self._row(*row) for row in rows]).to(scores)

    def _row(self, answer: list[int], query: Tensor, scores: Tensor) -> Tensor:
        """Return the scores ``(V,)`` of a row, which is computed by itself, so that it is the same in any batch."""
        likely, tokens = scores.softmax(-1).topk(min(self._k, len(scores)))
        texts = [self._lm.decode([*answer, token]).strip() for token in tokens.tolist()]
        cosines = (query @ self._scorer.embed_texts(texts).to(query).T).amax(0)
        similar = (cosines / self._temperature).softmax(-1).to(likely)
        chosen = (likely + self._weight * similar) / (1 + self._weight)
        return torch.full_like(scores, -math.inf).scatter(0, tokens, chosen.log())


def _query(scorer: Scorer, prompt: Sequence[Piece], of: Sequence[Mapping[str, Any]]) -> Tensor:
    """Return the vectors ``(Q, D)`` of length 1 of what answers are compared with; the most similar one counts."""
    total: Tensor | None = None
    for member in of:
        vectors = _weight(member) * _vectors(scorer, prompt, member)
        total = vectors if total is None else total + vectors
    if total is None:
        raise MLLMError("guided has of: []: give an image or a text that answers are compared with.")
    return normalize(total, dim=-1)


def _vectors(scorer: Scorer, prompt: Sequence[Piece], member: Mapping[str, Any]) -> Tensor:
    """Return the scorer's vectors ``(Q, D)`` of one member of the sum; Q is 1 for most scorers."""
    if isinstance(text := member.get("text"), str):
        return scorer.embed_texts([text]).float()
    image: Any = member["image"]
    if isinstance(image, str) and image == PROMPT:
        images = images_of(prompt)
        if not images:
            raise MLLMError(
                "guided compares answers with the prompt's image, and a prompt has none. Give an image, or of: [{text: "
                "...}]."
            )
        image = images[-1]
    vectors = scorer.embed_images([source_of(image)]).float()[0]
    return vectors if vectors.dim() == 2 else vectors[None]


def _weight(member: Mapping[str, Any]) -> float:
    """Return the weight of a member of the sum.

    Raises:
        MLLMError: it is no mapping of an image or a text and a weight.
    """
    keys = set(member) if isinstance(member, Mapping) else set()
    weight = member.get("weight", 1.0) if keys else None
    number = isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight)
    if not number or len(keys & {"image", "text"}) != 1 or keys - {"image", "text", "weight"}:
        raise MLLMError(
            f"guided has {member!r} in of: expected mappings of image or text, and weight, such as {{text: night, "
            "weight: -1}."
        )
    return float(member.get("weight", 1.0))
