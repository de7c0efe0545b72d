"""The text side of a Q-Former: words beside the queries, in one transformer, under three masks (arXiv:2301.12597)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

from mllm.hub import loading as hub

Mode = Literal["contrastive", "matching", "generation"]


class Words(nn.Module):
    """A tokenizer, a table of words and positions, and what guesses a word from a state.

    Args:
        tokenizer: a folder or hub id.
        config: the Q-Former's; its vocabulary is set to the tokenizer's and one more.

    Attributes:
        start: the id that a text starts with when it is generated; no text holds it.
    """

    def __init__(self, tokenizer: str, config: Any) -> None:
        super().__init__()
        self.tokenizer = hub.load_processor(AutoTokenizer, tokenizer)
        if self.tokenizer is None:  # only its configuration is here
            known = hub.load_config(tokenizer)
            self.start, padding = known.vocab_size, known.pad_token_id
        else:
            self.start, padding = len(self.tokenizer), self.tokenizer.pad_token_id
        config.vocab_size, config.pad_token_id = self.start + 1, padding
        self.table = Blip2TextEmbeddings(config)
        for embedding in (self.table.word_embeddings, self.table.position_embeddings):
            nn.init.normal_(embedding.weight, std=config.initializer_range)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def tokenize(self, texts: Sequence[str], longest: int = 32) -> tuple[Tensor, Tensor]:
        """Return ids ``(B, T)``, padded behind, and their mask; a text that is longer is cut."""
        found = self.tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        device = self.bias.device
        return found["input_ids"].to(device), found["attention_mask"].to(device)

    def logits(self, states: Tensor) -> Tensor:
        """Return logits ``(B, T, V)`` of words from states ``(B, T, dim)``, by the table itself."""
        return nn.functional.linear(states, self.table.word_embeddings.weight, self.bias)


def joint_mask(queries: int, mask: Tensor, mode: Mode) -> Tensor:
    """Return who sees whom among queries and text: ``(B, 1, Q + T, Q + T)``, True where a row sees a column.

    Args:
        queries: Q.
        mask: ``(B, T)`` of the text, 1 where there is a word.
        mode: ``contrastive``: queries and text do not see each other; ``matching``: all see all; ``generation``: words
            see the queries and the words before them, queries see queries only.
    """
    size = queries + mask.shape[1]
    sees = torch.ones(size, size, dtype=torch.bool, device=mask.device)
    if mode != "matching":
        sees[:queries, queries:] = False
    if mode == "contrastive":
        sees[queries:, :queries] = False
    if mode == "generation":
        sees[queries:, queries:] = sees[queries:, queries:].tril()
    there = torch.cat([mask.new_ones(len(mask), queries), mask], dim=1).bool()
    return (sees & there[:, None, :])[:, None]
