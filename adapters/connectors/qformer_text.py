"""Read text in a Q-Former: token embeddings, a tied output layer, and BLIP-2's three masks (arXiv:2301.12597)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

from mllm.hub import loading as hub

Mode = Literal["contrastive", "matching", "generation"]


class Words(nn.Module):
    """A tokenizer, word and position embeddings, and an output layer whose weights are tied to the embeddings.

    Args:
        tokenizer: a folder or hub id.
        config: the Q-Former's configuration; its vocabulary is set to the tokenizer's plus the start token.

    Attributes:
        start: the id of the start token of generation, which no text contains.
        table: the embeddings.
    """

    def __init__(self, tokenizer: str, config: Any) -> None:
        super().__init__()
        self.tokenizer = hub.load_processor(AutoTokenizer, tokenizer)
        if self.tokenizer is None:  # only its configuration is on this machine
            bert = hub.load_config(tokenizer)
            self.start, padding = bert.vocab_size, bert.pad_token_id
        else:
            self.start, padding = len(self.tokenizer), self.tokenizer.pad_token_id
        config.vocab_size, config.pad_token_id = self.start + 1, padding
        self.table = Blip2TextEmbeddings(config)
        for embedding in (self.table.word_embeddings, self.table.position_embeddings):
            nn.init.normal_(embedding.weight, std=config.initializer_range)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def tokenize(self, texts: Sequence[str], longest: int = 32) -> tuple[Tensor, Tensor]:
        """Return ids ``(B, T)``, padded on the right, and their mask; a longer text is truncated."""
        encoded = self.tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        device = self.bias.device
        return encoded["input_ids"].to(device), encoded["attention_mask"].to(device)

    def tokenize_ends(self, texts: Sequence[str], longest: int = 128) -> tuple[Tensor, Tensor]:
        """Return ids ``(B, T)`` and their mask as `tokenize` does; a longer text loses its beginning."""
        encoded = self.tokenizer(list(texts), return_special_tokens_mask=True)
        rows = []
        for ids, special in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
            words = [index for index, is_special in enumerate(special) if not is_special]
            left_out = set(words[: max(len(ids) - longest, 0)])
            rows.append(torch.tensor([token for index, token in enumerate(ids) if index not in left_out]))
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        ids = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        return ids.to(self.bias.device), mask.to(self.bias.device)

    def logits(self, states: Tensor) -> Tensor:
        """Return logits ``(B, T, V)`` of states ``(B, T, dim)``, by the tied output layer."""
        return nn.functional.linear(states, self.table.word_embeddings.weight, self.bias)


def joint_mask(queries: int, mask: Tensor, mode: Mode) -> Tensor:
    """Return the attention mask ``(B, 1, Q + T, Q + T)`` of queries and text: True where a row attends to a column.

    Args:
        queries: Q.
        mask: ``(B, T)`` of the text, 1 at its tokens and 0 at padding.
        mode: ``contrastive``: queries and text do not attend to each other; ``matching``: full attention;
            ``generation``: the text attends to the queries and causally to itself, queries attend to queries only.
    """
    size = queries + mask.shape[1]
    attends = torch.ones(size, size, dtype=torch.bool, device=mask.device)
    if mode != "matching":
        attends[:queries, queries:] = False
    if mode == "contrastive":
        attends[queries:, :queries] = False
    if mode == "generation":
        attends[queries:, queries:] = attends[queries:, queries:].tril()
    not_padding = torch.cat([mask.new_ones(len(mask), queries), mask], dim=1).bool()
    return (attends & not_padding[:, None, :])[:, None]
