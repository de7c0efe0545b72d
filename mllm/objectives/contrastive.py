"""Contrast images with captions: InfoNCE over a batch, whose pairs on all processes are negatives of each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, distributed
from torch.nn.functional import cross_entropy, normalize

from mllm.capabilities import SentenceModel
from mllm.errors import MLLMError
from mllm.processes import gather_rows
from mllm.prompts.batch import Batch
from mllm.prompts.pieces import Piece, Target, images_of
from mllm.registry import Positive
from mllm.slots import Connector, Inputs, LanguageModel


class ImageTextPairs:
    """The base class of objectives on pairs: they count pairs, and the other pairs of the batch are negatives."""

    per_example = False

    def count(self, rows: Sequence[Sequence[Piece]], batch: Batch | None) -> int:
        """Return the number of pairs."""
        return len(rows)


class SentenceContrastive(ImageTextPairs):
    """Symmetric InfoNCE between images and whole sentences (CLIP, arXiv:2103.00020).

    An image's vector is the mean of its visual tokens, a text's vector that of the sentence encoder, both normalized.
    Pairs with the same text are positives of each other (UniCL, arXiv:2204.03610).

    Args:
        temperature: divides the cosine similarities.

    Raises:
        MLLMError: a temperature that is not positive.
    """

    needs = (SentenceModel, Connector)

    def __init__(self, *, temperature: Positive = 0.05) -> None:
        if temperature <= 0:
            raise MLLMError(
                f"The objective contrastive has temperature {temperature}: expected a number above 0. Its default is "
                "0.05."
            )
        self.temperature = temperature

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over pairs."""
        captions = captions_of(inputs.rows)
        assert inputs.overview is not None
        images = normalize(inputs.overview.float().mean(1), dim=-1)  # (B, D_lm)
        texts = inputs.model.lm.sentences(captions).float()
        (every_image, every_text), _ = of_all_processes(inputs, images, texts)
        every_caption = gather_object(captions) if shares_batch(inputs) else captions
        same = torch.tensor([[one == other for other in every_caption] for one in captions], device=images.device)
        targets = same / same.sum(1, keepdim=True)  # of both directions
        to_texts, to_images = (images @ every_text.T, texts @ every_image.T)
        losses = [cross_entropy(each / self.temperature, targets, reduction="sum") for each in (to_texts, to_images)]
        return (losses[0] + losses[1]) / 2


class PatchContrastive(ImageTextPairs):
    """Symmetric InfoNCE between visual tokens and the tokens of captions (CG-VLM, arXiv:2311.17945).

    The similarity of an image and a caption is the mean, over the caption's tokens, of the cosine between the token's
    embedding and the mean of the image's visual tokens.

    Args:
        temperature: divides the similarities.
    """

    needs = (LanguageModel, Connector)

    def __init__(self, *, temperature: Positive = 0.07) -> None:
        self.temperature = temperature

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over pairs."""
        captions, lm = captions_of(inputs.rows), inputs.model.lm
        assert inputs.overview is not None
        images = normalize(inputs.overview.float().mean(1), dim=-1)  # (B, D_lm)
        texts = torch.stack([_mean_direction(lm, caption) for caption in captions])  # (B, D_lm)
        (every_image, every_text), start = of_all_processes(inputs, images, texts)
        return symmetric_infonce(
            images @ every_text.T / self.temperature, texts @ every_image.T / self.temperature, start
        )


def shares_batch(inputs: Inputs) -> bool:
    """Whether other processes have other pairs of the batch: in training by several processes."""
    return bool(inputs.model.training and distributed.is_available() and distributed.is_initialized())


def of_all_processes(inputs: Inputs, *rows: Tensor) -> tuple[list[Tensor], int]:
    """Return the rows ``(N, ...)`` of the whole batch, of ``(n, ...)`` here, and the index of the first row here."""
    if not shares_batch(inputs):
        return list(rows), 0
    gathered = [gather_rows(each) for each in rows]
    return [each for each, _ in gathered], gathered[0][1]


def captions_of(rows: Sequence[Sequence[Piece]]) -> list[str]:
    """Return each row's caption.

    Raises:
        MLLMError: a row is not one image and one target text.
    """
    captions = []
    for row in rows:
        targets = [piece.text.strip() for piece in row if isinstance(piece, Target)]
        if len(images_of(row)) != 1 or len(targets) != 1 or not targets[0]:
            raise MLLMError(
                f"An example has {len(images_of(row))} images and {len(targets)} target texts; objectives on pairs "
                "need one of each. Train them on captions."
            )
        captions += targets
    return captions


def symmetric_infonce(to_texts: Tensor, to_images: Tensor, start: int = 0, smoothing: float = 0.0) -> Tensor:
    """Return the summed InfoNCE of the pairs on this process, the mean of both directions.

    Args:
        to_texts: logits ``(n, N)`` of this process's images and the texts of all processes.
        to_images: logits ``(n, N)`` of this process's texts and the images of all processes.
        start: the index of this process's first pair.
        smoothing: label smoothing.
    """
    targets = torch.arange(start, start + len(to_texts), device=to_texts.device)
    losses = [
        cross_entropy(each, targets, reduction="sum", label_smoothing=smoothing) for each in (to_texts, to_images)
    ]
    return (losses[0] + losses[1]) / 2


def _mean_direction(lm: Any, caption: str) -> Tensor:
    """Return the mean ``(D_lm,)`` of a caption's normalized token embeddings."""
    ids = torch.tensor(lm.tokenize(f" {caption}"), device=lm.model.device)
    return normalize(lm.embed(ids).float(), dim=-1).mean(0)
