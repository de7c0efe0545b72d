"""Learning to find images: a caption's state at a head's token, against images (FROMAGe, arXiv:2301.13823).

Notable: a caption is read as text alone, behind the recipe's caption prompt, with the tokens behind it that stand for
an image. All objectives on captions look at the same pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed
from torch.nn.functional import cross_entropy

from mllm.errors import MLLMError
from mllm.processes import gathered
from mllm.prompts.batch import Batch
from mllm.prompts.pieces import Piece
from mllm.readout.states import captions, read_captions
from mllm.readout.tokens import HEAD
from mllm.slots import Inputs


class Contrast:
    """InfoNCE between captions and images, the mean of both directions; negatives come from all processes."""

    needs = ("lm", "encoder", "tokens", f"heads.{HEAD}")

    def count(self, rows: Sequence[Sequence[Piece]], batch: Batch | None) -> int:
        """Return the number of captions that have an image before them."""
        return sum(place is not None for place, _ in captions(rows))

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over captions."""
        head = inputs.model.heads[HEAD]
        said = read_captions(inputs)
        pairs = [(row, place) for row, place in enumerate(said.images) if place is not None]
        if not pairs or inputs.features is None:
            raise MLLMError("No example of a batch has a caption behind an image, which the head learns from.")
        rows, places = map(list, zip(*pairs, strict=True))
        texts = head.of_states(said.states[rows, said.tokens.index(head.token)])  # (N, D)
        images = head.of_features(inputs.features[places])  # (N, D)
        every_text, every_image, start = texts, images, 0
        if inputs.model.training and distributed.is_initialized():
            every_text, start = gathered(texts)
            every_image, start = gathered(images)
        right = torch.arange(start, start + len(texts), device=texts.device)
        sharp = head.scale.exp()
        to_images = cross_entropy(sharp * texts @ every_image.T, right, reduction="sum")
        to_texts = cross_entropy(sharp * images @ every_text.T, right, reduction="sum")
        return (to_images + to_texts) / 2


class TokenPrediction:
    """The negative log-likelihood, behind a caption, of the first token of an image: when to show one.

    The tokens behind the first always follow it, so nothing is learnt of them (GILL, arXiv:2305.17216).
    """

    needs = ("lm", "tokens", "image_tokens")

    def count(self, rows: Sequence[Sequence[Piece]], batch: Batch | None) -> int:
        """Return the number of captions."""
        return len(captions(rows))

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over captions."""
        said = read_captions(inputs)
        first = inputs.model.lm.new_tokens[said.tokens[0]]
        wanted = torch.full((len(said.logits),), first, device=said.logits.device)
        return cross_entropy(said.logits.float(), wanted, reduction="sum")
