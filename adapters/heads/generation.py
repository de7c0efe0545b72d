"""Compute an image decoder's condition from the states at new tokens: four heads.

Each reads the states and input embeddings ``(N, r, D_lm)`` at its r tokens and returns ``(N, L, W)``, which the decoder
takes in place of its text encoder's output.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mllm.capabilities import ImageTokenHead
from mllm.errors import MLLMError
from mllm.registry import Count


class Generation(ImageTokenHead):
    """A transformer with learned queries, from states to a condition (GILL, arXiv:2305.17216).

    Args:
        lm_dim: D_lm.
        vis_dim: not used.
        tokens: r; their names are ``[IMG0]``, ``[IMG1]``, ...
        length: L of the condition.
        width: W of the condition.
        dim: hidden size.
        layers: of the transformer's encoder, and of its decoder.
        heads: attention heads.

    Attributes:
        tokens: the names of the tokens.
        condition: ``(L, W)``.

    Raises:
        MLLMError: there is no language model.
    """

    def __init__(
        self,
        *,
        lm_dim: int | None,
        vis_dim: int | None = None,
        tokens: Count = 8,
        length: Count = 77,
        width: Count = 768,
        dim: Count = 512,
        layers: Count = 4,
        heads: Count = 4,
    ) -> None:
        super().__init__()
        self.tokens, self.condition = names(tokens), (length, width)
        self.enter = nn.Linear(needed(lm_dim, "generation"), dim)
        self.queries = nn.Parameter(torch.randn(length, dim))
        self.transformer = transformer(dim, layers, heads)
        self.leave = nn.Linear(dim, width)

    def forward(self, states: Tensor, embeddings: Tensor) -> Tensor:
        """Return conditions ``(N, L, W)`` of last states and input embeddings ``(N, r, D_lm)``."""
        inputs = self.enter((states + embeddings).to(self.queries.dtype))
        return self.leave(self.transformer(inputs, self.queries.expand(len(states), -1, -1)))


class Bridge(ImageTokenHead):
    """A linear layer without bias and a LayerNorm, token by token, as in VisCPM-Paint (arXiv:2308.12038).

    Args:
        lm_dim: D_lm.
        vis_dim: not used.
        tokens: r, which is also the condition's length.
        width: W of the condition.

    Attributes:
        tokens: the names of the tokens.
        condition: ``(r, W)``.
    """

    def __init__(
        self, *, lm_dim: int | None, vis_dim: int | None = None, tokens: Count = 77, width: Count = 1024
    ) -> None:
        super().__init__()
        self.tokens, self.condition = names(tokens), (tokens, width)
        self.map = nn.Linear(needed(lm_dim, "bridge"), width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, states: Tensor, embeddings: Tensor) -> Tensor:
        """Return conditions ``(N, r, W)`` of last states ``(N, r, D_lm)``; the embeddings are not used."""
        return self.norm(self.map(states.to(self.map.weight.dtype)))


class Affine(ImageTokenHead):
    """One linear layer on the concatenated states, which is fitted in closed form (`mllm.fits.affine`).

    Args:
        lm_dim: D_lm.
        vis_dim: not used.
        tokens: r.
        length: L of the condition.
        width: W of the condition.

    Attributes:
        tokens: the names of the tokens.
        condition: ``(L, W)``.
    """

    def __init__(
        self,
        *,
        lm_dim: int | None,
        vis_dim: int | None = None,
        tokens: Count = 1,
        length: Count = 1,
        width: Count = 384,
    ) -> None:
        super().__init__()
        self.tokens, self.condition = names(tokens), (length, width)
        self.project = nn.Linear(tokens * needed(lm_dim, "affine"), length * width)

    def forward(self, states: Tensor, embeddings: Tensor) -> Tensor:
        """Return conditions ``(N, L, W)`` of last states ``(N, r, D_lm)``; the embeddings are not used."""
        flat: Tensor = self.project(states.flatten(1).to(self.project.weight.dtype))
        return flat.unflatten(1, self.condition)


class Aligner(ImageTokenHead):
    """A transformer to the condition's space, and one back, used in training only (AlignerNet, arXiv:2310.02992).

    Args:
        lm_dim: D_lm.
        vis_dim: not used.
        tokens: r.
        length: L of the condition.
        width: W of the condition, also the hidden size.
        layers: of each transformer's encoder, and of its decoder.
        heads: attention heads.

    Attributes:
        tokens: the names of the tokens.
        condition: ``(L, W)``.
    """

    def __init__(
        self,
        *,
        lm_dim: int | None,
        vis_dim: int | None = None,
        tokens: Count = 8,
        length: Count = 77,
        width: Count = 768,
        layers: Count = 4,
        heads: Count = 4,
    ) -> None:
        super().__init__()
        lm_dim = needed(lm_dim, "aligner")
        self.tokens, self.condition = names(tokens), (length, width)
        self.enter, self.queries = nn.Linear(lm_dim, width), nn.Parameter(torch.randn(length, width))
        self.there = transformer(width, layers, heads)
        self.back_queries, self.back = nn.Parameter(torch.randn(tokens, width)), transformer(width, layers, heads)
        self.leave = nn.Linear(width, lm_dim)

    def forward(self, states: Tensor, embeddings: Tensor) -> Tensor:
        """Return conditions ``(N, L, W)`` of last states ``(N, r, D_lm)``; the embeddings are not used."""
        inputs = self.enter(states.to(self.queries.dtype))
        conditions: Tensor = self.there(inputs, self.queries.expand(len(states), -1, -1))
        return conditions

    def restore(self, conditions: Tensor) -> Tensor:
        """Return states ``(N, r, D_lm)`` reconstructed from conditions; the objective compares both."""
        return self.leave(self.back(conditions, self.back_queries.expand(len(conditions), -1, -1)))


def names(count: int) -> tuple[str, ...]:
    """Return the names of an image's tokens.

    Raises:
        MLLMError: a count below 1.
    """
    if count < 1:
        raise MLLMError(f"A head that makes images has tokens: {count}: expected at least one. Raise it.")
    return tuple(f"[IMG{number}]" for number in range(count))


def needed(lm_dim: int | None, head: str) -> int:
    """Return D_lm.

    Raises:
        MLLMError: there is no language model.
    """
    if lm_dim is None:
        raise MLLMError(
            f"The head {head} reads a language model's states, and the recipe has none. Add one: lm: {{model: ...}}."
        )
    return lm_dim


def transformer(dim: int, layers: int, heads: int) -> nn.Transformer:
    """Return `torch.nn.Transformer`, pre-norm and without dropout."""
    layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(dim), enable_nested_tensor=False)
    sizes = {"num_encoder_layers": layers, "num_decoder_layers": layers, "dim_feedforward": 4 * dim, "dropout": 0.0}
    return nn.Transformer(dim, heads, **sizes, custom_encoder=encoder, batch_first=True, norm_first=True)  # type: ignore[arg-type]
