"""Train a Q-Former on image-caption pairs: contrast, matching and caption generation (BLIP-2, arXiv:2301.12597).

The negatives of a pair are the other pairs of the batch, on all processes, so a process never splits its share of a
batch. Every pair has the same weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, distributed
from torch.nn.functional import cross_entropy, pad

from mllm.capabilities import ContrastHead, MatchHead, ReadsText
from mllm.errors import MLLMError
from mllm.objectives.contrastive import (
    ImageTextPairs,
    captions_of,
    of_all_processes,
    shares_batch,
    symmetric_infonce,
)
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
        scores = similarities(inputs)
        return symmetric_infonce(scores.to_texts, scores.to_images, scores.start, self.smoothing)


class ImageTextMatching(ImageTextPairs):
    """The cross-entropy of whether an image and a caption match (BLIP-2's ITM).

    Each pair comes with two hard negatives: its image with another caption and its caption with another image of the
    batch, sampled by the softmax of the contrastive similarities.
    """

    needs = (ReadsText, ContrastHead, MatchHead)

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over pairs of the mean over the pair and its two negatives."""
        ids, mask = tokens_of(inputs)
        scores, features = similarities(inputs), inputs.features
        assert features is not None
        if scores.to_texts.shape[1] < 2:
            raise MLLMError(
                "The objective itm got a batch of one pair: it samples negatives from the batch. Set batch_size to 2 "
                "or more."
            )
        caption = sample_negatives(scores.to_texts.detach(), scores.start)  # one for each image
        image = sample_negatives(scores.to_images.detach(), scores.start)  # one for each caption
        ids, mask = _equally_long(inputs, ids, mask)
        (every_image, every_text, every_mask), _ = of_all_processes(inputs, features, ids, mask)
        queries, _ = inputs.model.connector.joint(
            torch.cat([features, features, every_image[image]]),
            torch.cat([ids, every_text[caption], ids]),
            torch.cat([mask, every_mask[caption], mask]),
            "matching",
        )
        true = torch.arange(3 * len(ids), device=ids.device) < len(ids)
        return cross_entropy(inputs.model.find(MatchHead).match(queries).float(), true.long(), reduction="sum") / 3


class ImageTextGeneration(ImageTextPairs):
    """The language modeling loss of a caption given the image, computed by the connector alone (BLIP-2's ITG).

    Args:
        smoothing: label smoothing (0.1 in BLIP-2's code).
    """

    needs = (ReadsText,)

    def __init__(self, *, smoothing: Dropout = 0.0) -> None:
        self.smoothing = smoothing

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over captions of the mean negative log-likelihood of their tokens."""
        connector, (ids, mask) = inputs.model.connector, tokens_of(inputs)
        input_ids = ids.clone()
        input_ids[:, 0] = connector.words.start
        _, states = connector.joint(inputs.features, input_ids, mask, "generation")
        logits = connector.words.logits(states[:, :-1]).float()
        losses = cross_entropy(
            logits.transpose(1, 2), ids[:, 1:], reduction="none", label_smoothing=self.smoothing
        )  # (B, T - 1)
        losses = losses * mask[:, 1:]
        return (losses.sum(1) / mask[:, 1:].sum(1).clamp(min=1)).sum()


def tokens_of(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return the captions' ids ``(B, T)`` from the connector's own tokenizer, and their mask."""
    if "tokens" not in inputs.shared:
        inputs.shared["tokens"] = inputs.model.connector.words.tokenize(captions_of(inputs.rows))
    ids, mask = inputs.shared["tokens"]
    return ids, mask


class Similarities(NamedTuple):
    """The similarities of the pairs on this process and those on all processes, over the temperature."""

    to_texts: Tensor  # (n, N) of images here and all texts
    to_images: Tensor  # (n, N) of texts here and all images
    start: int  # the index of the first pair here


def similarities(inputs: Inputs) -> Similarities:
    """Return the contrast head's similarities: of the queries, the most similar one counts."""
    if "similarities" not in inputs.shared:
        head, (ids, mask) = inputs.model.find(ContrastHead), tokens_of(inputs)
        states, text_states = inputs.model.connector.joint(inputs.features, ids, mask, "contrastive")
        queries, texts = head.of_queries(states), head.of_texts(text_states[:, 0])  # (n, Q, dim), (n, dim)
        (every_image, every_text), start = of_all_processes(inputs, queries, texts)
        temperature = cast(Any, head).temperature
        to_texts = (queries @ every_text.T).amax(1).float() / temperature
        to_images = (every_image @ texts.T).amax(1).T.float() / temperature
        inputs.shared["similarities"] = Similarities(to_texts, to_images, start)
    scores: Similarities = inputs.shared["similarities"]
    return scores


def sample_negatives(logits: Tensor, start: int = 0) -> Tensor:
    """Return for each row of ``(n, N)`` the index of another column than its own, sampled by the softmax of the row.

    The first row's own column is ``start``, and so on.
    """
    weights = logits.softmax(1) + 1e-4  # so that another column always has a probability above 0
    rows = torch.arange(len(weights), device=weights.device)
    weights[rows, start + rows] = 0
    return torch.multinomial(weights, 1)[:, 0]


def _equally_long(inputs: Inputs, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return ids and their mask, padded on the right to the length of the longest caption on any process."""
    if not shares_batch(inputs):
        return ids, mask
    longest = torch.tensor(ids.shape[1], device=ids.device)
    distributed.all_reduce(longest, distributed.ReduceOp.MAX)
    missing = int(longest) - ids.shape[1]
    return pad(ids, (0, missing), value=inputs.model.connector.words.tokenizer.pad_token_id), pad(mask, (0, missing))
