"""Learning to find images: a caption's state at a head's token, against images (FROMAGe, arXiv:2301.13823).

Notable: a caption is read as text alone, behind the recipe's caption prompt, with the tokens behind it that stand for
an image. All objectives on captions look at the same pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, distributed
from torch.nn.functional import cross_entropy

from mllm.capabilities import ImageTokenHead, RetrievalHead
from mllm.errors import MLLMError
from mllm.processes import gathered
from mllm.prompts.batch import Batch
from mllm.prompts.pieces import Piece
from mllm.readout.states import captions, read_captions
from mllm.slots import Encoder, Inputs, LanguageModel


class RetrievalContrast:
    """InfoNCE between captions and images, the mean of both directions; negatives come from all processes."""

    needs = (LanguageModel, Encoder, RetrievalHead)
    per_example = False

    def count(self, rows: Sequence[Sequence[Piece]], batch: Batch | None) -> int:
        """Return the number of captions that have an image before them."""
        return sum(place is not None for place, _ in captions(rows))

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over captions."""
        head = inputs.model.find(RetrievalHead)
        captions_read = read_captions(inputs)
        pairs = [(row, index) for row, index in enumerate(captions_read.images) if index is not None]
        if not pairs or inputs.features is None:
            raise MLLMError("No example of a batch has a caption behind an image, which the head learns from.")
        rows, indices = map(list, zip(*pairs, strict=True))
        texts = head.of_states(captions_read.states[rows, captions_read.tokens.index(head.tokens[0])])  # (N, D)
        images = head.of_features(inputs.features[indices])  # (N, D)
        every_text, every_image, start = texts, images, 0
        if inputs.model.training and distributed.is_initialized():
            every_text, start = gathered(texts)
            every_image, start = gathered(images)
        right = torch.arange(start, start + len(texts), device=texts.device)
        sharp = cast(Any, head).scale.exp()
        to_images = cross_entropy(sharp * texts @ every_image.T, right, reduction="sum")
        to_texts = cross_entropy(sharp * images @ every_text.T, right, reduction="sum")
        return (to_images + to_texts) / 2


class TokenPrediction:
    """The negative log-likelihood, behind a caption, of the first token of an image: when to show one.

    The tokens behind the first always follow it, so nothing is learnt of them (GILL, arXiv:2305.17216).
    """

    needs = (LanguageModel, ImageTokenHead)
    per_example = False

    def count(self, rows: Sequence[Sequence[Piece]], batch: Batch | None) -> int:
        """Return the number of captions."""
        return len(captions(rows))

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over captions."""
        captions_read = read_captions(inputs)
        first = inputs.model.lm.new_tokens[captions_read.tokens[0]]
        targets = torch.full((len(captions_read.logits),), first, device=captions_read.logits.device)
        return cross_entropy(captions_read.logits.float(), targets, reduction="sum")
