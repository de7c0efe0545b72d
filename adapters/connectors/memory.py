"""Look up texts in a key-value memory: the features' best key, and the words of its text (Tip-Adapter)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from mllm.adapters.connectors.reduce import Reduce
from torch import Tensor, nn

from mllm.errors import MLLMError
from mllm.registry import Count
from mllm.slots import Connector


class Memory(Connector):
    """Features ``(B, P, D_vis)`` to the word embeddings ``(B, Q, D_lm)`` of the text whose key scores highest.

    As the cache model of Tip-Adapter (arXiv:2111.03930), but with a learned key for each text instead of the features
    of each example, and with the text's words as the value. The fit ``targets: texts`` sets both in closed form. The
    output is one text's embeddings, not a mean of several: a language model that reads mixtures of words misreads
    them. Its gradient is that of the softmax of the scores (straight-through estimator, arXiv:1308.3432).

    Args:
        vis_dim: D_vis.
        lm_dim: D_lm.
        num_patches: P.
        grid: rows and columns of the patches, or None.
        tokens: visual tokens per text: its first ones, and neutral words after its end.
        texts: S, the most texts.
        cells: 1: the mean of all features is looked up. A larger square number: the grid is average-pooled to that many
            cells, each of which is looked up by itself.
        shuffle: a side s: s x s neighboring patches are concatenated first, so that it counts where something is.
        threshold: where no score is higher, the output is neutral words alone. Fitted scores are about 1 for the right
            text and 0 for the others.

    Attributes:
        num_tokens: Q, ``cells`` times ``tokens``.
        keys: the linear map to the scores of the texts.
        values: word embeddings ``(S + 1, tokens D_lm)`` of the texts, one after another; the neutral word's last.

    Raises:
        MLLMError: there is no language model, or the patches cannot be pooled to so many cells.
    """

    def __init__(
        self,
        *,
        vis_dim: int,
        lm_dim: int | None,
        num_patches: int,
        grid: tuple[int, int] | None,
        tokens: Count = 4,
        texts: Count = 1024,
        cells: Count = 1,
        shuffle: Count | None = None,
        threshold: float = 0.2,
    ) -> None:
        super().__init__()
        if lm_dim is None:
            raise MLLMError(
                "The connector memory needs a language model's width, and there is no lm. Add one: lm: {model: ...}."
            )
        reduced = cells > 1 or shuffle is not None
        options = {"vis_dim": vis_dim, "num_patches": num_patches, "grid": grid}
        self.cells = Reduce(**options, tokens=cells, shuffle=shuffle) if reduced else None
        self.num_tokens = tokens * cells
        self.threshold = threshold
        self.keys = nn.Linear(self.cells.dim if self.cells is not None else vis_dim, texts)
        self.values = nn.Embedding(texts + 1, tokens * lm_dim)

    def linear(self) -> nn.Linear:
        """Return the keys."""
        return self.keys

    def output(self) -> nn.Embedding:
        """Return the values."""
        return self.values

    def body(self, features: Tensor) -> Tensor:
        """Return the pooled features ``(B, cells, D_vis)``."""
        return features.mean(1, keepdim=True) if self.cells is None else self.cells(features)

    @torch.no_grad()
    def remember(self, texts: Sequence[Tensor], neutral: Tensor) -> None:
        """Set the values.

        Args:
            texts: the word embeddings ``(T, D_lm)`` of each text.
            neutral: the embedding ``(D_lm,)`` of the neutral word, which stands where there is no other.

        Raises:
            MLLMError: there are more texts than places.
        """
        places, width = self.values.weight.shape
        if len(texts) >= places:
            raise MLLMError(
                f"The connector memory has places for {places - 1} texts, and the captions have {len(texts)} different "
                f"ones. Set connector.texts={len(texts)}."
            )
        tokens = width // len(neutral)
        self.values.weight.copy_(neutral.repeat(tokens).expand_as(self.values.weight))
        for row, embeddings in zip(self.values.weight, texts, strict=False):
            kept = embeddings[:tokens].flatten()
            row[: len(kept)] = kept

    def forward(self, features: Tensor) -> Tensor:
        """Return the word embeddings ``(B, Q, D_lm)`` of the best texts."""
        scores = self.keys(self.body(features))  # (B, cells, S)
        scores = torch.cat([scores, scores.new_full((*scores.shape[:-1], 1), self.threshold)], dim=-1)
        words = self.values(scores.argmax(-1))  # (B, cells, tokens D_lm)
        if torch.is_grad_enabled():
            soft = scores.softmax(-1) @ self.values.weight
            words = words.detach() + soft - soft.detach()
        return rearrange(words, "b c (t d) -> b (c t) d", t=self.num_tokens // scores.shape[1])
