"""Heads that make an image decoder's condition of the states at new tokens: four kinds, one slot.

Each reads the states and input embeddings ``(N, r, D_lm)`` at its r tokens and returns ``(N, L, W)``, what the decoder
takes in place of its text encoder's output.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mllm.capabilities import ImageTokenHead
from mllm.errors import MLLMError


class Generation(ImageTokenHead):
    """A transformer with learned queries, from states to a condition (GILL, arXiv:2305.17216).

    Args:
        lm_dim: D_lm.
        vis_dim: not used.
        tokens: r; they are called ``[IMG0]``, ``[IMG1]``, ...
        length: L of the condition.
        width: W of the condition.
        dim: width inside.
        layers: of the transformer's encoder, and of its decoder.
        heads: of its attention.

    Attributes:
        tokens: the names of the tokens.
        condition: ``(L, W)``.

    Raises:
        MLLMError: no language model.
    """

    def __init__(
        self,
        *,
        lm_dim: int | None,
        vis_dim: int | None = None,
        tokens: int = 8,
        length: int = 77,
        width: int = 768,
        dim: int = 512,
        layers: int = 4,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.tokens, self.condition = names(tokens), (length, width)
        self.enter = nn.Linear(needed(lm_dim, "generation"), dim)
        self.queries = nn.Parameter(torch.randn(length, dim))
        self.transformer = transformer(dim, layers, heads)
        self.leave = nn.Linear(dim, width)

    def forward(self, states: Tensor, embeddings: Tensor) -> Tensor:
        """Return conditions ``(N, L, W)`` of last states and input embeddings ``(N, r, D_lm)``."""
        entered = self.enter((states + embeddings).to(self.queries.dtype))
        return self.leave(self.transformer(entered, self.queries.expand(len(states), -1, -1)))


class Bridge(ImageTokenHead):
    """A linear map without bias and a LayerNorm, token by token, as VisCPM-Paint has them (arXiv:2308.12038).

    Args:
        lm_dim: D_lm.
        vis_dim: not used.
        tokens: r, which is the condition's length, too.
        width: W of the condition.

    Attributes:
        tokens: the names of the tokens.
        condition: ``(r, W)``.
    """

    def __init__(self, *, lm_dim: int | None, vis_dim: int | None = None, tokens: int = 77, width: int = 1024) -> None:
        super().__init__()
        self.tokens, self.condition = names(tokens), (tokens, width)
        self.map = nn.Linear(needed(lm_dim, "bridge"), width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, states: Tensor, embeddings: Tensor) -> Tensor:
        """Return conditions ``(N, r, W)`` of last states ``(N, r, D_lm)``; the embeddings are not looked at."""
        return self.norm(self.map(states.to(self.map.weight.dtype)))


class Affine(ImageTokenHead):
    """One linear map of all states together, which is fitted in closed form (`mllm.fits.affine`).

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
        self, *, lm_dim: int | None, vis_dim: int | None = None, tokens: int = 1, length: int = 1, width: int = 384
    ) -> None:
        super().__init__()
        self.tokens, self.condition = names(tokens), (length, width)
        self.project = nn.Linear(tokens * needed(lm_dim, "affine"), length * width)

    def forward(self, states: Tensor, embeddings: Tensor) -> Tensor:
        """Return conditions ``(N, L, W)`` of last states ``(N, r, D_lm)``; the embeddings are not looked at."""
        flat: Tensor = self.project(states.flatten(1).to(self.project.weight.dtype))
        return flat.unflatten(1, self.condition)


class Aligner(ImageTokenHead):
    """A transformer into the condition's space, and one back, which trains alone (AlignerNet, arXiv:2310.02992).

    Args:
        lm_dim: D_lm.
        vis_dim: not used.
        tokens: r.
        length: L of the condition.
        width: W of the condition, and inside.
        layers: of each transformer's encoder, and of its decoder.
        heads: of its attention.

    Attributes:
        tokens: the names of the tokens.
        condition: ``(L, W)``.
    """

    def __init__(
        self,
        *,
        lm_dim: int | None,
        vis_dim: int | None = None,
        tokens: int = 8,
        length: int = 77,
        width: int = 768,
        layers: int = 4,
        heads: int = 4,
    ) -> None:
        super().__init__()
        lm_dim = needed(lm_dim, "aligner")
        self.tokens, self.condition = names(tokens), (length, width)
        self.enter, self.queries = nn.Linear(lm_dim, width), nn.Parameter(torch.randn(length, width))
        self.there = transformer(width, layers, heads)
        self.back_queries, self.back = nn.Parameter(torch.randn(tokens, width)), transformer(width, layers, heads)
        self.leave = nn.Linear(width, lm_dim)

    def forward(self, states: Tensor, embeddings: Tensor) -> Tensor:
        """Return conditions ``(N, L, W)`` of last states ``(N, r, D_lm)``; the embeddings are not looked at."""
        entered = self.enter(states.to(self.queries.dtype))
        found: Tensor = self.there(entered, self.queries.expand(len(states), -1, -1))
        return found

    def restore(self, conditions: Tensor) -> Tensor:
        """Return states ``(N, r, D_lm)`` as conditions tell them: the objective holds them against the true ones."""
        return self.leave(self.back(conditions, self.back_queries.expand(len(conditions), -1, -1)))


def names(count: int) -> tuple[str, ...]:
    """Return the names of so many tokens.

    Raises:
        MLLMError: fewer than one.
    """
    if count < 1:
        raise MLLMError(f"A head that makes images has tokens: {count}: expected at least one.")
    return tuple(f"[IMG{number}]" for number in range(count))


def needed(lm_dim: int | None, head: str) -> int:
    """Return D_lm.

    Raises:
        MLLMError: there is no language model.
    """
    if lm_dim is None:
        raise MLLMError(f"The head {head} reads a language model's states, and the recipe names none. Give lm.")
    return lm_dim


def transformer(dim: int, layers: int, heads: int) -> nn.Transformer:
    """Return torch's own, pre-norm and without dropout."""
    layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(dim), enable_nested_tensor=False)
    sizes = {"num_encoder_layers": layers, "num_decoder_layers": layers, "dim_feedforward": 4 * dim, "dropout": 0.0}
    return nn.Transformer(dim, heads, **sizes, custom_encoder=encoder, batch_first=True, norm_first=True)  # type: ignore[arg-type]
