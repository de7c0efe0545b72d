"""Learn to retrieve images: contrast the state at a head's token after a caption with images (FROMAGe).

The paper is arXiv:2301.13823. A caption is read as text alone: the recipe's caption prompt, the caption, and the tokens
that stand for an image. All objectives on captions share one forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mllm.capabilities import ImageTokenHead, RetrievalHead
from mllm.errors import MLLMError
from mllm.objectives.contrastive import of_all_processes, symmetric_infonce
from mllm.prompts.batch import Batch
from mllm.prompts.pieces import Piece
from mllm.readout.states import captions, read_captions
from mllm.slots import Encoder, Inputs, LanguageModel


class RetrievalContrast:
    """Symmetric InfoNCE between captions and images; negatives come from all processes."""

    needs = (LanguageModel, Encoder, RetrievalHead)
    per_example = False

    def count(self, rows: Sequence[Sequence[Piece]], batch: Batch | None) -> int:
        """Return the number of captions that have an image before them."""
        return sum(image is not None for image, _ in captions(rows))

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over captions."""
        head = inputs.model.find(RetrievalHead)
        captions_read = read_captions(inputs)
        pairs = [(row, index) for row, index in enumerate(captions_read.images) if index is not None]
        if not pairs or inputs.features is None:
            raise MLLMError("No example of a batch has a caption after an image, which the head learns from.")
        rows, indices = map(list, zip(*pairs, strict=True))
        texts = head.of_states(captions_read.states[rows, captions_read.tokens.index(head.tokens[0])])  # (N, D)
        images = head.of_features(inputs.features[indices])  # (N, D)
        (every_image, every_text), start = of_all_processes(inputs, images, texts)
        scale = cast(Any, head).scale.exp()
        return symmetric_infonce(scale * images @ every_text.T, scale * texts @ every_image.T, start)


class TokenPrediction:
    """The negative log-likelihood of an image's first token after a caption: the model learns when to show an image.

    The other tokens of an image always follow the first, so their prediction is not trained (GILL, arXiv:2305.17216).
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
