"""Objectives on pairs of a picture and its caption: which belong together, and what is said without a language model.

Notable: the other pairs of the batch are what a pair is told from, so a batch is never split; with several processes
each looks at its own share. Every pair counts the same.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mllm.capabilities import ContrastHead, MatchHead, ReadsText
from mllm.errors import MLLMError
from mllm.objectives.contrastive import ImageTextPairs, both_ways, captions_of
from mllm.slots import Inputs


class ImageTextContrast(ImageTextPairs):
    """InfoNCE, both ways, between a picture's queries and a caption read without the picture (BLIP-2's ITC).

    Args:
        smoothing: of the labels.
    """

    needs = (ReadsText, ContrastHead)

    def __init__(self, *, smoothing: float = 0.1) -> None:
        self.smoothing = smoothing

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over pairs."""
        return both_ways(similarities(inputs), self.smoothing)


class ImageTextMatching(ImageTextPairs):
    """Whether a picture and a caption belong together (BLIP-2's ITM).

    Each pair stands beside two that do not match: its picture with another caption and its caption with another
    picture, drawn from the batch, the more likely the more alike the contrast finds them.
    """

    needs = (ReadsText, ContrastHead, MatchHead)

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over pairs, of each the mean over the three."""
        ids, mask = tokens_of(inputs)
        alike, features = similarities(inputs).detach(), inputs.features
        assert features is not None
        if len(alike) < 2:
            raise MLLMError("The objective itm draws other captions from the batch: set batch_size to 2 or more.")
        caption, picture = drawn(alike), drawn(alike.T)  # for each picture, for each caption
        queries, _ = inputs.model.connector.joint(
            torch.cat([features, features, features[picture]]),
            torch.cat([ids, ids[caption], ids]),
            torch.cat([mask, mask[caption], mask]),
            "matching",
        )
        true = torch.arange(3 * len(ids), device=ids.device) < len(ids)
        return cross_entropy(inputs.model.find(MatchHead).match(queries).float(), true.long(), reduction="sum") / 3


class ImageTextGeneration(ImageTextPairs):
    """A caption's words, each from the picture and those before it, guessed by the connector (BLIP-2's ITG)."""

    needs = (ReadsText,)

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over captions of their words' mean negative log-likelihood."""
        connector, (ids, mask) = inputs.model.connector, tokens_of(inputs)
        told = ids.clone()
        told[:, 0] = connector.words.start
        _, states = connector.joint(inputs.features, told, mask, "generation")
        logits = connector.words.logits(states[:, :-1]).float()
        losses = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none") * mask[:, 1:]  # (B, T - 1)
        return (losses.sum(1) / mask[:, 1:].sum(1).clamp(min=1)).sum()


def tokens_of(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return the captions' ids ``(B, T)`` by the connector's own tokenizer, and their mask."""
    if "tokens" not in inputs.shared:
        inputs.shared["tokens"] = inputs.model.connector.words.tokenize(captions_of(inputs.rows))
    ids, mask = inputs.shared["tokens"]
    return ids, mask


def similarities(inputs: Inputs) -> Tensor:
    """Return how alike the contrast finds the pictures and captions of a batch, over its temperature ``(B, B)``."""
    if "similarities" not in inputs.shared:
        head, (ids, mask) = inputs.model.find(ContrastHead), tokens_of(inputs)
        queries, text = inputs.model.connector.joint(inputs.features, ids, mask, "contrastive")
        inputs.shared["similarities"] = (head.of_queries(queries) @ head.of_texts(text[:, 0]).T).amax(1).float() / cast(
            Any, head
        ).temperature
    found: Tensor = inputs.shared["similarities"]
    return found


def drawn(logits: Tensor) -> Tensor:
    """Return for each row of ``(B, B)`` another column, drawn by the softmax of the row."""
    weights = logits.softmax(1) + 1e-4  # so that there is always one to be drawn
    return torch.multinomial(weights.fill_diagonal_(0), 1)[:, 0]
