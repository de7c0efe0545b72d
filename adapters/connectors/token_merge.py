"""A transformer that merges similar tokens layer by layer (SimVLG, arXiv:2310.03291; ToMe, arXiv:2210.09461)."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from mllm.adapters.connectors.reduce import projection
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from mllm.errors import MLLMError
from mllm.slots import Connector


class TokenMerge(Connector):
    """Features ``(B, P, D_vis)`` to ``P - layers * merge`` visual tokens: each layer joins the most similar tokens.

    Args:
        vis_dim: D_vis.
        lm_dim: D_lm; None: there is no language model, and no map to it.
        num_patches: P.
        grid: not used: a sequence will do.
        merge: r, tokens that every layer joins to others (SimVLG: 19, so 257 become 29).
        layers: BERT blocks.
        dim: width inside.
        heads: of the attention.
        init: a folder or hub id of a BERT whose blocks it starts from; None: random weights.
        dropout: inside.

    Attributes:
        num_tokens: Q.
        project: the linear map to the language model's width.

    Raises:
        MLLMError: a layer would have to join more than half of its tokens.
    """

    def __init__(
        self,
        *,
        vis_dim: int,
        lm_dim: int | None,
        num_patches: int,
        grid: tuple[int, int] | None,
        merge: int = 19,
        layers: int = 12,
        dim: int = 768,
        heads: int = 12,
        init: str | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        left = num_patches - (layers - 1) * merge  # tokens that reach the last layer
        if merge < 0 or left // 2 < merge:
            raise MLLMError(
                f"connector.merge is {merge}: {layers} layers would have to join more than half of their tokens, from "
                f"{num_patches} features on. Set connector.merge or connector.layers lower."
            )
        self.num_tokens, self.merge, self.heads = num_patches - layers * merge, merge, heads
        self.enter = nn.Linear(vis_dim, dim)
        self.blocks = _blocks(layers=layers, dim=dim, heads=heads, init=init, dropout=dropout)
        self.project = projection(dim, lm_dim)

    def body(self, features: Tensor) -> Tensor:
        """Return the merged tokens ``(B, Q, dim)``."""
        tokens = self.enter(features)
        sizes = torch.ones_like(tokens[..., :1])  # patches in each token
        block: Any
        for block in self.blocks:
            keys = rearrange(block.attention.self.key(tokens), "b n (h d) -> b n h d", h=self.heads).mean(2)
            tokens, sizes = merged(block.attention(tokens)[0], sizes, keys, self.merge)
            tokens = block.feed_forward_chunk(tokens)
        return tokens

    def forward(self, features: Tensor) -> Tensor:
        """Return visual tokens ``(B, Q, D_lm)`` of features ``(B, P, D_vis)``."""
        return self.project(self.body(features))


def merged(tokens: Tensor, sizes: Tensor, keys: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Join the ``number`` most similar pairs of tokens by bipartite soft matching (ToMe, section 3).

    Every second token may be joined to its most similar one among the others; a joined token is the mean of its
    patches.

    Args:
        tokens: ``(B, N, D)``.
        sizes: ``(B, N, 1)``, patches in each token.
        keys: ``(B, N, K)``, compared by cosine.
        number: tokens fewer afterwards, at most N // 2.

    Returns:
        Tokens ``(B, N - number, D)`` and their sizes.
    """
    if number == 0:
        return tokens, sizes
    keys = nn.functional.normalize(keys, dim=-1)
    similar, target = (keys[:, ::2] @ keys[:, 1::2].mT).max(-1)  # (B, N_even): the best partner of each
    order = similar.argsort(dim=-1, descending=True, stable=True)
    joined, kept = order[:, :number], order[:, number:].sort(dim=-1).values
    weighted = torch.cat([tokens * sizes, sizes], dim=-1)  # sums and counts, added up together
    even, odd = weighted[:, ::2], weighted[:, 1::2]
    place = target.gather(1, joined).unsqueeze(-1).expand(-1, -1, even.shape[-1])
    odd = odd.scatter_add(1, place, _take(even, joined))
    whole = torch.cat([_take(even, kept), odd], dim=1)
    return whole[..., :-1] / whole[..., -1:], whole[..., -1:]


def _take(tokens: Tensor, places: Tensor) -> Tensor:
    return tokens.gather(1, places.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def _blocks(*, layers: int, dim: int, heads: int, init: str | None, dropout: float) -> nn.ModuleList:
    if init is not None:
        try:
            bert = BertModel.from_pretrained(init, add_pooling_layer=False, num_hidden_layers=layers)
        except (OSError, ValueError) as error:
            raise MLLMError(f"connector.init: {init!r} could not be loaded: {error}") from None
        if (bert.config.hidden_size, bert.config.num_attention_heads) != (dim, heads):
            raise MLLMError(f"connector.init: {init!r} has width {bert.config.hidden_size}. Set connector.dim to it.")
    else:
        config = BertConfig(
            hidden_size=dim,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * dim,
            vocab_size=1,  # its words are not used
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        bert = BertModel(config, add_pooling_layer=False)
    blocks: nn.ModuleList = bert.encoder.layer
    return blocks
