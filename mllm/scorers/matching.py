"""Score images and texts with a Q-Former that reads both: rank by contrast, rerank by matching.

This is BLIP-2's retrieval (arXiv:2301.12597): the contrast encodes each image and each text once, so it ranks all
candidates; matching reads every pair jointly, so it reranks the first ones only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mllm.capabilities import ContrastHead, MatchHead, ReadsText
from mllm.encoders.feature_store import FeatureStore
from mllm.errors import MLLMError
from mllm.model import Model

CHUNK = 32  # images, texts or pairs of a batch


class MatchingScorer(nn.Module):
    """A scorer with a connector that reads texts and the heads ``contrast`` and ``match``.

    Args:
        model: the model; in a recipe, the path of its run.
        rerank: how many of the closest candidates by contrast are reranked by matching.

    Raises:
        MLLMError: the model lacks one of these parts.
    """

    def __init__(self, *, model: Model, rerank: int = 128) -> None:
        super().__init__()
        self.model, self.rerank = model, rerank
        if not model.has(ReadsText, ContrastHead, MatchHead):
            raise MLLMError(
                "Matching needs connector={type: qformer, words: ...} and the heads contrast and match; the model has "
                f"{', '.join(self.model.heads) or 'no head'}. Train the first stage of such a recipe (blip2-stage1)."
            )
        self._connector: Any = self.model.connector
        self._contrast = model.find(ContrastHead)
        self._features = FeatureStore(self.model).whole

    @property
    def dim(self) -> int:
        """Return the width D of the vectors."""
        encoder = self.model.encoder
        features = torch.zeros(1, encoder.num_patches, encoder.dim, device=self.model.device)
        with torch.no_grad():
            return int(self._contrast.of_queries(self._connector.body(features)).shape[-1])

    def image_text(self, images: Sequence[Any], texts: Sequence[str]) -> Tensor:
        """Return the similarities ``(I, N)`` of images and texts: the maximum over the image's queries."""
        return (self.embed_images(images) @ self.embed_texts(texts).T).amax(1)

    @torch.no_grad()
    def embed_images(self, images: Sequence[Any]) -> Tensor:
        """Return vectors ``(I, Q, D)`` of length 1, one for each query."""
        contrast, connector = self._contrast, self._connector
        states = (connector.body(self._features(chunk)) for chunk in _chunks(images))
        return torch.cat([contrast.of_queries(queries).cpu() for queries in states])

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return vectors ``(N, D)`` of length 1."""
        contrast, connector = self._contrast, self._connector
        states = (connector.read(*connector.words.tokenize(chunk))[:, 0] for chunk in _chunks(texts))
        return torch.cat([contrast.of_texts(first).cpu() for first in states])

    @torch.no_grad()
    def matches(self, images: Sequence[Any], texts: Sequence[str]) -> Tensor:
        """Return the log-odds ``(N,)`` that each image matches the text at the same index."""
        connector, match = self._connector, self.model.find(MatchHead).match
        logits = []
        for some_images, some_texts in zip(_chunks(images), _chunks(texts), strict=True):
            ids, mask = connector.words.tokenize(some_texts)
            queries, _ = connector.joint(self._features(some_images), ids, mask, "matching")
            logits.append(match(queries).float().cpu())
        no, yes = torch.cat(logits).T
        return yes - no


def _chunks(inputs: Sequence[Any]) -> list[Sequence[Any]]:
    return [inputs[start : start + CHUNK] for start in range(0, len(inputs), CHUNK)]
