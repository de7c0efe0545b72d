"""Train a Q-Former on image-caption pairs: contrast, matching and caption generation (BLIP-2, arXiv:2301.12597).

The negatives of a pair are the other pairs of the batch, so a batch is never split; with several processes, they are
those of the same process. Every pair has the same weight.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mllm.capabilities import ContrastHead, MatchHead, ReadsText
from mllm.errors import MLLMError
from mllm.objectives.contrastive import ImageTextPairs, captions_of, symmetric_infonce
from mllm.registry import Dropout
from mllm.slots import Inputs


class ImageTextContrast(ImageTextPairs):
    """Symmetric InfoNCE between an image's queries and a caption read without the image (BLIP-2's ITC).

    Args:
        smoothing: label smoothing.
    """

    needs = (ReadsText, ContrastHead)

    def __init__(self, *, smoothing: Dropout = 0.1) -> None:
        self.smoothing = smoothing

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over pairs."""
        return symmetric_infonce(similarities(inputs), self.smoothing)


class ImageTextMatching(ImageTextPairs):
    """The cross-entropy of whether an image and a caption match (BLIP-2's ITM).

    Each pair comes with two hard negatives: its image with another caption and its caption with another image of the
    batch, sampled by the softmax of the contrastive similarities.
    """

    needs = (ReadsText, ContrastHead, MatchHead)

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over pairs of the mean over the pair and its two negatives."""
        ids, mask = tokens_of(inputs)
        scores, features = similarities(inputs).detach(), inputs.features
        assert features is not None
        if len(scores) < 2:
            raise MLLMError(
                "The objective itm got a batch of one pair: it samples negatives from the batch. Set batch_size to 2 "
                "or more."
            )
        caption, image = sample_negatives(scores), sample_negatives(scores.T)  # one for each image, for each caption
        queries, _ = inputs.model.connector.joint(
            torch.cat([features, features, features[image]]),
            torch.cat([ids, ids[caption], ids]),
            torch.cat([mask, mask[caption], mask]),
            "matching",
        )
        true = torch.arange(3 * len(ids), device=ids.device) < len(ids)
        return cross_entropy(inputs.model.find(MatchHead).match(queries).float(), true.long(), reduction="sum") / 3


class ImageTextGeneration(ImageTextPairs):
    """The language modeling loss of a caption given the image, computed by the connector alone (BLIP-2's ITG)."""

    needs = (ReadsText,)

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over captions of the mean negative log-likelihood of their tokens."""
        connector, (ids, mask) = inputs.model.connector, tokens_of(inputs)
        input_ids = ids.clone()
        input_ids[:, 0] = connector.words.start
        _, states = connector.joint(inputs.features, input_ids, mask, "generation")
        logits = connector.words.logits(states[:, :-1]).float()
        losses = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none") * mask[:, 1:]  # (B, T - 1)
        return (losses.sum(1) / mask[:, 1:].sum(1).clamp(min=1)).sum()


def tokens_of(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return the captions' ids ``(B, T)`` from the connector's own tokenizer, and their mask."""
    if "tokens" not in inputs.shared:
        inputs.shared["tokens"] = inputs.model.connector.words.tokenize(captions_of(inputs.rows))
    ids, mask = inputs.shared["tokens"]
    return ids, mask


def similarities(inputs: Inputs) -> Tensor:
    """Return the contrast head's similarities of a batch's images and captions, over its temperature ``(B, B)``."""
    if "similarities" not in inputs.shared:
        head, (ids, mask) = inputs.model.find(ContrastHead), tokens_of(inputs)
        queries, text = inputs.model.connector.joint(inputs.features, ids, mask, "contrastive")
        inputs.shared["similarities"] = (head.of_queries(queries) @ head.of_texts(text[:, 0]).T).amax(1).float() / cast(
            Any, head
        ).temperature
    scores: Tensor = inputs.shared["similarities"]
    return scores


def sample_negatives(logits: Tensor) -> Tensor:
    """Return for each row of ``(B, B)`` the index of another column, sampled by the softmax of the row."""
    weights = logits.softmax(1) + 1e-4  # so that another column always has a probability above 0
    return torch.multinomial(weights.fill_diagonal_(0), 1)[:, 0]
