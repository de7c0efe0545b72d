"""A connector that reads pictures beside texts as what compares: alike by its contrast, and matched pair by pair.

As BLIP-2 finds images and texts (arXiv:2301.12597): contrast looks at each once, so it goes through all candidates, and
matching, which reads both at once, puts the first of them in order.
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

CHUNK = 32  # pictures, texts or pairs that are read at once


class MatchingScorer(nn.Module):
    """A scorer made of a connector that reads texts and the heads ``contrast`` and ``match``.

    Args:
        model: the model; in a recipe, its run.
        rerank: of the candidates that the contrast finds closest, how many are put in order by matching.

    Raises:
        MLLMError: no model there, or one without these.
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
        self._features = FeatureStore(self.model)

    def image_text(self, images: Sequence[Any], texts: Sequence[str]) -> Tensor:
        """Return the similarities ``(I, N)`` of images and texts: that of the query which is most like the text."""
        return (self.embed_images(images) @ self.embed_texts(texts).T).amax(1)

    @torch.no_grad()
    def embed_images(self, images: Sequence[Any]) -> Tensor:
        """Return vectors ``(I, Q, D)`` of length 1, one for each query."""
        contrast, connector = self._contrast, self._connector
        return torch.cat([contrast.of_queries(connector.body(self._features(some))).cpu() for some in _chunks(images)])

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return vectors ``(N, D)`` of length 1."""
        contrast, connector = self._contrast, self._connector
        read = [connector.read(*connector.words.tokenize(some))[:, 0] for some in _chunks(texts)]
        return torch.cat([contrast.of_texts(states).cpu() for states in read])

    @torch.no_grad()
    def matches(self, images: Sequence[Any], texts: Sequence[str]) -> Tensor:
        """Return the log-odds ``(N,)`` that each picture and the text at its side belong together."""
        connector, match = self._connector, self.model.find(MatchHead).match
        found = []
        for some, own in zip(_chunks(images), _chunks(texts), strict=True):
            queries, _ = connector.joint(self._features(some), *connector.words.tokenize(own), "matching")
            found.append(match(queries).float().cpu())
        no, yes = torch.cat(found).T
        return yes - no


def _chunks(things: Sequence[Any]) -> list[Sequence[Any]]:
    return [things[start : start + CHUNK] for start in range(0, len(things), CHUNK)]
