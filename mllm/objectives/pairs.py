"""Objectives on pairs of a picture and its caption: which belong together, and what is said without a language model.

Notable: the other pairs of the batch are what a pair is told from, so a batch is never split; with several processes
each looks at its own share. Every pair counts the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from mllm.errors import MLLMError
from mllm.objective import Inputs
from mllm.prompt import Batch, Piece, Target, images_of


class _Pairs:
    """What these objectives share: they count pairs."""

    def count(self, rows: Sequence[Sequence[Piece]], batch: Batch | None) -> int:
        """Return the number of pairs."""
        return len(rows)


class Contrastive(_Pairs):
    """InfoNCE, both ways, between pictures and whole sentences (CLIP, arXiv:2103.00020).

    A picture's vector is the mean of its visual tokens, a text's that of the language model's ``sentences``, both of
    length 1. Pairs with the same text are all right for each other (UniCL, arXiv:2204.03610).

    Args:
        temperature: what the cosines are divided by.
    """

    needs = ("lm.sentences", "connector")

    def __init__(self, *, temperature: float = 0.05) -> None:
        if temperature <= 0:
            raise MLLMError(f"The objective contrastive has temperature {temperature}: expected a number above 0.")
        self.temperature = temperature

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over pairs."""
        captions = captions_of(inputs.rows)
        assert inputs.visual is not None
        seen = normalize(inputs.visual.float().mean(1), dim=-1)  # (B, D_lm)
        logits = seen @ inputs.model.lm.sentences(captions).float().T / self.temperature
        same = torch.tensor([[one == other for other in captions] for one in captions], device=logits.device)
        right = same / same.sum(1, keepdim=True)  # symmetric, so it holds for both directions
        losses = [cross_entropy(each, right, reduction="sum") for each in (logits, logits.T)]
        return (losses[0] + losses[1]) / 2


class PatchContrastive(_Pairs):
    """InfoNCE, both ways, between a picture's visual tokens and the words of captions (CG-VLM, arXiv:2311.17945).

    A picture is as like a caption as the mean, over the caption's tokens, of the cosine of the token's embedding and
    the mean of the picture's visual tokens.

    Args:
        temperature: what similarities are divided by.
    """

    needs = ("lm", "connector")

    def __init__(self, *, temperature: float = 0.07) -> None:
        self.temperature = temperature

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over pairs."""
        captions, lm = captions_of(inputs.rows), inputs.model.lm
        assert inputs.visual is not None
        seen = normalize(inputs.visual.float().mean(1), dim=-1)  # (B, D_lm)
        said = torch.stack([_words(lm, caption) for caption in captions])  # (B, D_lm)
        return both_ways(seen @ said.T / self.temperature)


class ImageTextContrast(_Pairs):
    """InfoNCE, both ways, between a picture's queries and a caption read without the picture (BLIP-2's ITC).

    Args:
        smoothing: of the labels.
    """

    needs = ("connector.joint", "heads.contrast")

    def __init__(self, *, smoothing: float = 0.1) -> None:
        self.smoothing = smoothing

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over pairs."""
        return both_ways(similarities(inputs), self.smoothing)


class ImageTextMatching(_Pairs):
    """Whether a picture and a caption belong together (BLIP-2's ITM).

    Each pair stands beside two that do not match: its picture with another caption and its caption with another
    picture, drawn from the batch, the more likely the more alike the contrast finds them.
    """

    needs = ("connector.joint", "heads.contrast", "heads.match")

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
        return cross_entropy(inputs.model.heads["match"](queries).float(), true.long(), reduction="sum") / 3


class ImageTextGeneration(_Pairs):
    """A caption's words, each from the picture and those before it, guessed by the connector (BLIP-2's ITG)."""

    needs = ("connector.joint",)

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over captions of their words' mean negative log-likelihood."""
        connector, (ids, mask) = inputs.model.connector, tokens_of(inputs)
        told = ids.clone()
        told[:, 0] = connector.words.start
        _, states = connector.joint(inputs.features, told, mask, "generation")
        logits = connector.words.logits(states[:, :-1]).float()
        losses = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none") * mask[:, 1:]  # (B, T - 1)
        return (losses.sum(1) / mask[:, 1:].sum(1).clamp(min=1)).sum()


def captions_of(rows: Sequence[Sequence[Piece]]) -> list[str]:
    """Return each row's caption.

    Raises:
        MLLMError: a row is not one picture and one text to be learnt.
    """
    found = []
    for row in rows:
        learnt = [piece.text.strip() for piece in row if isinstance(piece, Target)]
        if len(images_of(row)) != 1 or len(learnt) != 1 or not learnt[0]:
            raise MLLMError(
                f"An example has {len(images_of(row))} pictures and {len(learnt)} texts to learn; objectives on pairs "
                "need one of each. Train them on captions."
            )
        found += learnt
    return found


def tokens_of(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return the captions' ids ``(B, T)`` by the connector's own tokenizer, and their mask."""
    if "tokens" not in inputs.shared:
        inputs.shared["tokens"] = inputs.model.connector.words.tokenize(captions_of(inputs.rows))
    ids, mask = inputs.shared["tokens"]
    return ids, mask


def similarities(inputs: Inputs) -> Tensor:
    """Return how alike the contrast finds the pictures and captions of a batch, over its temperature ``(B, B)``."""
    if "similarities" not in inputs.shared:
        head, (ids, mask) = inputs.model.heads["contrast"], tokens_of(inputs)
        queries, text = inputs.model.connector.joint(inputs.features, ids, mask, "contrastive")
        inputs.shared["similarities"] = head(queries, text[:, 0]).float() / head.temperature
    found: Tensor = inputs.shared["similarities"]
    return found


def both_ways(logits: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the summed InfoNCE of logits ``(B, B)``, the mean of both directions."""
    own = torch.arange(len(logits), device=logits.device)
    losses = [cross_entropy(each, own, reduction="sum", label_smoothing=smoothing) for each in (logits, logits.T)]
    return (losses[0] + losses[1]) / 2


def drawn(logits: Tensor) -> Tensor:
    """Return for each row of ``(B, B)`` another column, drawn by the softmax of the row."""
    weights = logits.softmax(1) + 1e-4  # so that there is always one to be drawn
    return torch.multinomial(weights.fill_diagonal_(0), 1)[:, 0]


def _words(lm: Any, caption: str) -> Tensor:
    """Return the mean direction ``(D_lm,)`` of a caption's token embeddings."""
    ids = torch.tensor(lm.tokenize(f" {caption}"), device=lm.model.device)
    return normalize(lm.embed(ids).float(), dim=-1).mean(0)
