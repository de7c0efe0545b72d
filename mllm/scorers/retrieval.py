"""A model's retrieval head as what compares: pictures, captions and interleaved prompts in its shared space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mllm.capabilities import RetrievalHead
from mllm.media.images import source_of
from mllm.model import Model
from mllm.prompts.pieces import Control, Piece, answer_text, images_of
from mllm.readout.tokens import image_tokens

CHUNK = 32  # pictures, or prompts of about one length, that are read at once


class RetrievalScorer(nn.Module):
    """A scorer made of a retrieval head (`mllm.registry`: scorers).

    Args:
        model: the model; in a recipe, its run.

    Raises:
        MLLMError: no model there, or one without the head.
    """

    def __init__(self, *, model: Model) -> None:
        super().__init__()
        self.model = model
        model.find(RetrievalHead)

    def image_text(self, images: Sequence[Any], texts: Sequence[str]) -> Tensor:
        """Return the cosine similarities ``(I, N)`` of images and texts."""
        return self.embed_images(images) @ self.embed_texts(texts).T

    def embed_images(self, images: Sequence[Any]) -> Tensor:
        """Return vectors ``(I, D)`` of length 1."""
        return _by_chunks([source_of(image) for image in images], lambda some: of_images(self.model, some))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return vectors ``(N, D)`` of length 1 of captions, put as the head learnt them."""
        before = self.model.spec.prompt.caption
        return self.embed_prompts([[before + answer_text(text)] for text in texts])

    def embed_prompts(self, prompts: Sequence[Sequence[Piece]]) -> Tensor:
        """Return vectors ``(N, D)`` of length 1 of interleaved prompts, as they stand."""
        order = sorted(range(len(prompts)), key=lambda place: _length(prompts[place]))
        found = _by_chunks([prompts[place] for place in order], lambda some: of_prompts(self.model, some))
        return found[torch.tensor(order).argsort()]


@torch.no_grad()
def of_images(model: Model, images: Sequence[Any]) -> Tensor:
    """Return what the head makes of pictures, ``(I, D)``."""
    vectors: Tensor = model.find(RetrievalHead).of_features(model.features(images))
    return vectors.float().cpu()


@torch.no_grad()
def of_prompts(model: Model, prompts: Sequence[Sequence[Piece]]) -> Tensor:
    """Return what the head makes of its token behind each prompt, ``(N, D)``."""
    head, tokens = model.find(RetrievalHead), image_tokens(model)
    behind = Control("".join(tokens[: tokens.index(head.tokens[0]) + 1]))  # of several tokens the head reads one
    embeds, batch = model.prepare([[*prompt, behind] for prompt in prompts])
    vectors: Tensor = head.of_states(model.lm.hidden(embeds, batch.mask)[:, -1])
    return vectors.float().cpu()


def _by_chunks(things: Sequence[Any], embed: Callable[[Sequence[Any]], Tensor]) -> Tensor:
    return torch.cat([embed(things[start : start + CHUNK]) for start in range(0, len(things), CHUNK)])


def _length(prompt: Sequence[Piece]) -> tuple[int, int]:
    """Return the number of a prompt's pictures, and of its characters."""
    return len(images_of(prompt)), sum(len(piece) for piece in prompt if isinstance(piece, str))
