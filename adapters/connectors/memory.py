"""Look up texts in a key-value memory: the features' best key, and the words of its text (Tip-Adapter)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import starmap

import torch
from einops import rearrange
from mllm.adapters.connectors.reduce import Reduce
from torch import Tensor, nn

from mllm.errors import MLLMError
from mllm.media.tiles import Layout
from mllm.registry import Count
from mllm.slots import Connector


class Memory(Connector):
    """Features ``(B, P, D_vis)`` to the word embeddings ``(B, Q, D_lm)`` of the text whose key scores highest.

    As the cache model of Tip-Adapter (arXiv:2111.03930), but with a learned key for each text instead of the features
    of each example, and with the text's words as the value. The fit ``targets: texts`` sets both in closed form. The
    output is one text's embeddings, not a mean of several: a language model that reads mixtures of words misreads
    them. Its gradient is that of the softmax of the scores (straight-through estimator, arXiv:1308.3432).

    Lists of ``tokens`` and ``texts`` make several memories that are looked up side by side, and whose outputs follow
    each other: what is in an image, and what its background is like.

    Args:
        vis_dim: D_vis.
        lm_dim: D_lm.
        num_patches: P.
        grid: rows and columns of the patches, or None.
        tokens: visual tokens per text: its first ones, and neutral words after its end; of each memory.
        texts: S, the most texts; of each memory.
        cells: 1: the mean of all features is looked up. A larger square number: the grid is average-pooled to that many
            cells, each of which is looked up by itself.
        shuffle: a side s: s x s neighboring patches are concatenated first, so that it counts where something is.
        distinct: of an image that is cut into tiles, each text once, those of most tiles first, and then neutral words;
            otherwise the texts of one tile after another.
        threshold: where no score is higher, the output is neutral words alone. Fitted scores are about 1 for the right
            text and 0 for the others.

    Attributes:
        num_tokens: Q, ``cells`` times the sum of ``tokens``.
        lengths: ``tokens`` of each memory.
        sizes: S of each memory.
        keys: the linear map to the scores of the texts of all memories.
        values: of each memory the word embeddings ``(S + 1, tokens D_lm)`` of the texts, one after another; the neutral
            word's last.

    Raises:
        MLLMError: there is no language model, ``tokens`` and ``texts`` are not of equally many memories, or the patches
            cannot be pooled to so many cells.
    """

    def __init__(
        self,
        *,
        vis_dim: int,
        lm_dim: int | None,
        num_patches: int,
        grid: tuple[int, int] | None,
        tokens: Count | list[Count] = 4,
        texts: Count | list[Count] = 1024,
        cells: Count = 1,
        shuffle: Count | None = None,
        distinct: bool = False,
        threshold: float = 0.2,
    ) -> None:
        super().__init__()
        if lm_dim is None:
            raise MLLMError(
                "The connector memory needs a language model's width, and there is no lm. Add one: lm: {model: ...}."
            )
        tokens, self.sizes = ([each] if isinstance(each, int) else list(each) for each in (tokens, texts))
        if not tokens or len(tokens) != len(self.sizes):
            raise MLLMError(
                f"The connector memory has tokens={tokens} and texts={self.sizes}: expected a number of each for every "
                "memory. Give lists of the same length."
            )
        reduced = cells > 1 or shuffle is not None
        options = {"vis_dim": vis_dim, "num_patches": num_patches, "grid": grid}
        self.cells = Reduce(**options, tokens=cells, shuffle=shuffle) if reduced else None
        self.lengths, self.num_tokens = tokens, sum(tokens) * cells
        self.distinct, self.threshold = distinct, threshold
        self.keys = nn.Linear(self.cells.dim if self.cells is not None else vis_dim, sum(self.sizes))
        self.values = nn.ModuleList(
            nn.Embedding(size + 1, num * lm_dim) for size, num in zip(self.sizes, tokens, strict=True)
        )

    @property
    def _tables(self) -> list[nn.Embedding]:
        """Return the values of each memory."""
        return [table for table in self.values if isinstance(table, nn.Embedding)]

    def linear(self) -> nn.Linear:
        """Return the keys."""
        return self.keys

    def output(self) -> nn.ModuleList:
        """Return the values."""
        return self.values

    def body(self, features: Tensor) -> Tensor:
        """Return the pooled features ``(B, cells, D_vis)``."""
        return features.mean(1, keepdim=True) if self.cells is None else self.cells(features)

    @torch.no_grad()
    def remember(self, texts: Sequence[Sequence[Tensor]], neutral: Tensor) -> None:
        """Set the values.

        Args:
            texts: the word embeddings ``(T, D_lm)`` of each text of each memory.
            neutral: the embedding ``(D_lm,)`` of the neutral word, which stands where there is no other.

        Raises:
            MLLMError: there are not as many memories, or more texts than one has places for.
        """
        numbers = [len(each) for each in texts]
        fitting = (number <= size for number, size in zip(numbers, self.sizes, strict=False))
        if len(numbers) != len(self.sizes) or not all(fitting):
            raise MLLMError(
                f"The connector memory has places for {_listed(self.sizes)} texts, and the data has "
                f"{_listed(numbers)} different ones: captions are one memory, and the answers to a question are one "
                f"each. Set connector.texts={_listed(numbers)}, and connector.tokens accordingly."
            )
        for table, embeddings in zip(self._tables, texts, strict=True):
            _remember(table.weight, embeddings, neutral)

    def forward(self, features: Tensor) -> Tensor:
        """Return the word embeddings ``(B, Q, D_lm)`` of the best texts."""
        scores = self.keys(self.body(features))  # (B, cells, S of all memories)
        parts = zip(scores.split(self.sizes, dim=-1), self._tables, strict=True)
        words = torch.cat(list(starmap(self._best, parts)), dim=-1)  # (B, cells, tokens D_lm)
        return rearrange(words, "b c (t d) -> b (c t) d", t=self.num_tokens // scores.shape[1])

    def in_order(self, tokens: Tensor, layouts: Sequence[Layout] | None) -> Tensor:
        """Return the visual tokens ``(N, D_lm)`` of images, of those of their tiles ``(U, Q, D_lm)``."""
        if layouts is None or not self.distinct:
            return super().in_order(tokens, layouts)
        return torch.cat([self._gathered(tiles) for tiles in tokens.split([layout.tiles for layout in layouts])])

    def _gathered(self, tiles: Tensor) -> Tensor:
        """Return the texts of an image's tiles ``(U, Q, D_lm)`` as ``(U Q, D_lm)``, one memory after another."""
        cells = rearrange(tiles, "u (c t) d -> (u c) t d", t=sum(self.lengths))
        parts = zip(cells.split(self.lengths, dim=1), self._tables, strict=True)
        return torch.cat(
            [_each_once(texts, table.weight[-1].view_as(texts[0])).flatten(0, 1) for texts, table in parts]
        )

    def _best(self, scores: Tensor, table: nn.Embedding) -> Tensor:
        """Return the values ``(B, cells, tokens D_lm)`` of a memory, of its scores ``(B, cells, S)``."""
        scores = torch.cat([scores, scores.new_full((*scores.shape[:-1], 1), self.threshold)], dim=-1)
        words: Tensor = table(scores.argmax(-1))
        if torch.is_grad_enabled():
            soft = scores.softmax(-1) @ table.weight
            words = words.detach() + (soft - soft.detach())  # exactly the text's words
        return words


def _remember(table: Tensor, texts: Sequence[Tensor], neutral: Tensor) -> None:
    """Set a table ``(S + 1, tokens D_lm)`` to the word embeddings ``(T, D_lm)`` of texts."""
    tokens = table.shape[1] // len(neutral)
    table.copy_(neutral.repeat(tokens).expand_as(table))
    for row, embeddings in zip(table, texts, strict=False):
        kept = embeddings[:tokens].flatten()
        row[: len(kept)] = kept


def _each_once(texts: Tensor, neutral: Tensor) -> Tensor:
    """Return texts ``(N, tokens, D_lm)`` without repetitions, the most frequent first, filled up with neutral words."""
    same = (texts[:, None] == texts).flatten(2).all(-1)  # (N, N)
    counts, firsts = same.sum(1).tolist(), same.int().argmax(1).tolist()
    empty = (texts == neutral).flatten(1).all(1).tolist()
    kept = [index for index, first in enumerate(firsts) if first == index and not empty[index]]
    kept.sort(key=lambda index: -counts[index])
    return torch.cat([texts[kept], neutral.expand(len(texts) - len(kept), -1, -1)])


def _listed(numbers: Sequence[int]) -> str:
    """Return numbers as a recipe has them: of one memory a number."""
    return str(numbers[0]) if len(numbers) == 1 else str(list(numbers)).replace(" ", "")
