"""Merge similar tokens in every layer of a transformer (SimVLG, arXiv:2310.03291; ToMe, arXiv:2210.09461)."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from mllm.adapters.connectors.reduce import projection
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, BertModel

from mllm.errors import MLLMError
from mllm.hub import loading as hub
from mllm.registry import Count, Dropout
from mllm.slots import Connector


class TokenMerge(Connector):
    """Features ``(B, P, D_vis)`` to ``P - layers * merge`` visual tokens: each layer merges the most similar tokens.

    Args:
        vis_dim: D_vis.
        lm_dim: D_lm; None: there is no language model, and no projection to it.
        num_patches: P.
        grid: not used.
        merge: r, the tokens that every layer merges into others (SimVLG: 19, so 257 become 29).
        layers: BERT blocks.
        dim: hidden size.
        heads: attention heads.
        init: a part, folder or hub id of a BERT that initializes the blocks; None: random weights.
        positions: BERT's position embeddings, LayerNorm and dropout stand before the blocks.
        dropout: in the blocks; with ``init``, it is the BERT's.

    Attributes:
        num_tokens: Q.
        project: the linear layer to the language model's width.

    Raises:
        MLLMError: a layer would have to merge more than half of its tokens, or ``init`` does not fit.
    """

    def __init__(
        self,
        *,
        vis_dim: int,
        lm_dim: int | None,
        num_patches: int,
        grid: tuple[int, int] | None,
        merge: int = 19,
        layers: Count = 12,
        dim: Count = 768,
        heads: Count = 12,
        init: str | None = None,
        positions: bool = False,
        dropout: Dropout = 0.0,
    ) -> None:
        super().__init__()
        last = num_patches - (layers - 1) * merge  # tokens that reach the last layer
        if merge < 0 or last // 2 < merge:
            raise MLLMError(
                f"connector.merge is {merge}: one of the {layers} layers would have to merge more than half of its "
                f"tokens, starting from {num_patches} features. Lower connector.merge or connector.layers."
            )
        self.num_tokens, self.merge, self.heads = num_patches - layers * merge, merge, heads
        self.enter = nn.Linear(vis_dim, dim)
        bert = _random_bert(layers, dim, heads, dropout) if init is None else _pretrained_bert(init, layers, dim, heads)
        self.place = _positions(bert, num_patches) if positions else None
        self.blocks = bert.encoder.layer[:layers]
        self.project = projection(dim, lm_dim)

    def body(self, features: Tensor) -> Tensor:
        """Return the merged tokens ``(B, Q, dim)``."""
        tokens = self.enter(features)
        if self.place is not None:
            tokens = self.place(inputs_embeds=tokens)
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
    """Merge the ``number`` most similar pairs of tokens by bipartite soft matching (ToMe, section 3).

    Every even token may be merged into the most similar odd one; a merged token is the mean of its patches.

    Args:
        tokens: ``(B, N, D)``.
        sizes: ``(B, N, 1)``, patches in each token.
        keys: ``(B, N, K)``, compared by cosine.
        number: how many tokens are removed, at most N // 2.

    Returns:
        Tokens ``(B, N - number, D)`` and their sizes.
    """
    if number == 0:
        return tokens, sizes
    keys = nn.functional.normalize(keys, dim=-1)
    similar, target = (keys[:, ::2] @ keys[:, 1::2].mT).max(-1)  # (B, N_even): the most similar odd token of each
    order = similar.argsort(dim=-1, descending=True, stable=True)
    removed, remaining = order[:, :number], order[:, number:].sort(dim=-1).values
    weighted = torch.cat([tokens * sizes, sizes], dim=-1)  # sums and counts, added up together
    even, odd = weighted[:, ::2], weighted[:, 1::2]
    index = target.gather(1, removed).unsqueeze(-1).expand(-1, -1, even.shape[-1])
    odd = odd.scatter_add(1, index, _select(even, removed))
    sums = torch.cat([_select(even, remaining), odd], dim=1)
    return sums[..., :-1] / sums[..., -1:], sums[..., -1:]


def _select(tokens: Tensor, indices: Tensor) -> Tensor:
    """Return the tokens ``(B, K, D)`` at indices ``(B, K)``."""
    return tokens.gather(1, indices.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def _pretrained_bert(init: str, layers: int, dim: int, heads: int) -> Any:
    """Return the BERT of ``connector.init``.

    Raises:
        MLLMError: it cannot be loaded, is no BERT, or is of another shape.
    """
    folder = hub.resolve(init, group="lms")
    try:
        kind = hub.load_config(folder).model_type
        bert = hub.load_model(AutoModel, folder, add_pooling_layer=False) if kind == "bert" else None
    except OSError as error:
        raise MLLMError(
            f"connector.init: {init!r} could not be loaded: {error}. Give the id or folder of a BERT."
        ) from None
    if bert is None:
        raise MLLMError(f"connector.init is {init!r}, of type {kind}: expected a BERT. Give the id or folder of one.")
    shape = (bert.config.hidden_size, bert.config.num_attention_heads)
    if shape != (dim, heads) or len(bert.encoder.layer) < layers:
        raise MLLMError(
            f"connector.init: {init!r} has hidden size {shape[0]}, {shape[1]} heads and {len(bert.encoder.layer)} "
            f"layers, and the connector {dim}, {heads} and {layers}. Set connector.dim, heads and layers to the BERT's."
        )
    return bert


def _random_bert(layers: int, dim: int, heads: int, dropout: float) -> Any:
    config = BertConfig(
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * dim,
        vocab_size=1,  # the word embeddings are not used
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertModel(config, add_pooling_layer=False)


def _positions(bert: Any, num_patches: int) -> nn.Module:
    """Return a BERT's embedding layer without its word embeddings: it adds positions, and normalizes.

    Raises:
        MLLMError: it has fewer positions than there are features.
    """
    most = bert.config.max_position_embeddings
    if most < num_patches:
        raise MLLMError(f"connector.positions: BERT has {most} positions, for {num_patches} features. Leave it out.")
    embeddings: nn.Module = bert.embeddings
    del embeddings.word_embeddings
    return embeddings
