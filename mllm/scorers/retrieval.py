"""Score images, captions and interleaved prompts in the shared space of a model's retrieval head."""

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

CHUNK = 32  # images, or prompts of similar length, of a batch


class RetrievalScorer(nn.Module):
    """A scorer with a model's retrieval head.

    Args:
        model: the model; in a recipe, the path of its run.

    Raises:
        MLLMError: the model has no retrieval head.
    """

    def __init__(self, *, model: Model) -> None:
        super().__init__()
        self.model = model
        model.find(RetrievalHead)

    @property
    def dim(self) -> int:
        """Return the width D of the vectors."""
        encoder = self.model.encoder
        features = torch.zeros(1, encoder.num_patches, encoder.dim, device=self.model.device)
        with torch.no_grad():
            return int(self.model.find(RetrievalHead).of_features(features).shape[-1])

    def image_text(self, images: Sequence[Any], texts: Sequence[str]) -> Tensor:
        """Return the cosine similarities ``(I, N)`` of images and texts."""
        return self.embed_images(images) @ self.embed_texts(texts).T

    def embed_images(self, images: Sequence[Any]) -> Tensor:
        """Return vectors ``(I, D)`` of length 1."""
        return _by_chunks([source_of(image) for image in images], lambda chunk: embed_images(self.model, chunk))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return vectors ``(N, D)`` of length 1 of captions, each after the recipe's caption prompt."""
        prefix = self.model.spec.prompt.caption
        return self.embed_prompts([[prefix + answer_text(text)] for text in texts])

    def embed_prompts(self, prompts: Sequence[Sequence[Piece]]) -> Tensor:
        """Return vectors ``(N, D)`` of length 1 of interleaved prompts, without a template."""
        order = sorted(range(len(prompts)), key=lambda index: _length(prompts[index]))
        vectors = _by_chunks([prompts[index] for index in order], lambda chunk: of_prompts(self.model, chunk))
        return vectors[torch.tensor(order).argsort()]


@torch.no_grad()
def embed_images(model: Model, images: Sequence[Any]) -> Tensor:
    """Return the retrieval head's vectors ``(I, D)`` of images."""
    vectors: Tensor = model.find(RetrievalHead).of_features(model.features(images))
    return vectors.float().cpu()


@torch.no_grad()
def of_prompts(model: Model, prompts: Sequence[Sequence[Piece]]) -> Tensor:
    """Return the retrieval head's vectors ``(N, D)`` of prompts: of the state at its token, appended to each."""
    head, tokens = model.find(RetrievalHead), image_tokens(model)
    suffix = Control("".join(tokens[: tokens.index(head.tokens[0]) + 1]))  # the head reads one of several tokens
    embeds, batch = model.prepare([[*prompt, suffix] for prompt in prompts])
    vectors: Tensor = head.of_states(model.lm.hidden(embeds, batch.mask)[:, -1])
    return vectors.float().cpu()


def _by_chunks(inputs: Sequence[Any], embed: Callable[[Sequence[Any]], Tensor]) -> Tensor:
    return torch.cat([embed(inputs[start : start + CHUNK]) for start in range(0, len(inputs), CHUNK)])


def _length(prompt: Sequence[Piece]) -> tuple[int, int]:
    """Return the number of a prompt's images, and of its characters."""
    return len(images_of(prompt)), sum(len(piece) for piece in prompt if isinstance(piece, str))
