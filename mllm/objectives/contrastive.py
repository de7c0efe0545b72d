"""Contrast images with captions: InfoNCE over a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from mllm.capabilities import SentenceModel
from mllm.errors import MLLMError
from mllm.prompts.batch import Batch
from mllm.prompts.pieces import Piece, Target, images_of
from mllm.slots import Connector, Inputs, LanguageModel


class ImageTextPairs:
    """What objectives on pairs share: they count pairs, and the other pairs of the batch are negatives."""

    per_example = False

    def count(self, rows: Sequence[Sequence[Piece]], batch: Batch | None) -> int:
        """Return the number of pairs."""
        return len(rows)


class Contrastive(ImageTextPairs):
    """InfoNCE, both ways, between pictures and whole sentences (CLIP, arXiv:2103.00020).

    A picture's vector is the mean of its visual tokens, a text's that of the language model's ``sentences``, both of
    length 1. Pairs with the same text are all right for each other (UniCL, arXiv:2204.03610).

    Args:
        temperature: what the cosines are divided by.
    """

    needs = (SentenceModel, Connector)

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


class PatchContrastive(ImageTextPairs):
    """InfoNCE, both ways, between a picture's visual tokens and the words of captions (CG-VLM, arXiv:2311.17945).

    A picture is as like a caption as the mean, over the caption's tokens, of the cosine of the token's embedding and
    the mean of the picture's visual tokens.

    Args:
        temperature: what similarities are divided by.
    """

    needs = (LanguageModel, Connector)

    def __init__(self, *, temperature: float = 0.07) -> None:
        self.temperature = temperature

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over pairs."""
        captions, lm = captions_of(inputs.rows), inputs.model.lm
        assert inputs.visual is not None
        seen = normalize(inputs.visual.float().mean(1), dim=-1)  # (B, D_lm)
        said = torch.stack([_words(lm, caption) for caption in captions])  # (B, D_lm)
        return both_ways(seen @ said.T / self.temperature)


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


def both_ways(logits: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the summed InfoNCE of logits ``(B, B)``, the mean of both directions."""
    own = torch.arange(len(logits), device=logits.device)
    losses = [cross_entropy(each, own, reduction="sum", label_smoothing=smoothing) for each in (logits, logits.T)]
    return (losses[0] + losses[1]) / 2


def _words(lm: Any, caption: str) -> Tensor:
    """Return the mean direction ``(D_lm,)`` of a caption's token embeddings."""
    ids = torch.tensor(lm.tokenize(f" {caption}"), device=lm.model.device)
    return normalize(lm.embed(ids).float(), dim=-1).mean(0)
