"""Learn to generate images: match the condition of the decoder's text encoder, or minimize the denoising loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mllm.capabilities import ConditionHead, Denoises, RestoresStates
from mllm.errors import MLLMError
from mllm.prompts.batch import Batch
from mllm.prompts.pieces import Piece, images_of
from mllm.readout.states import captions, read_captions
from mllm.slots import ImageDecoder, Inputs, LanguageModel

LIMIT = 2 * 2**30  # bytes of cached conditions


class Distillation:
    """The distance between a head's condition and the frozen text encoder's output for the caption.

    No image is used. The text encoder's output is computed once for each caption, and cached.

    Args:
        distance: ``norm``, the mean over the condition's L vectors of their Euclidean distance (GILL,
            arXiv:2305.17216); or ``squared``, the mean squared error (Kosmos-G, arXiv:2310.02992). For a head that
            also reconstructs the language model's states from the condition, their distance is added.
    """

    needs = (LanguageModel, ConditionHead, ImageDecoder)
    per_example = False

    def __init__(self, *, distance: Literal["norm", "squared"] = "norm") -> None:
        self.distance = distance
        self._cache: dict[str, Tensor] = {}

    def count(self, rows: Sequence[Sequence[Piece]], batch: Batch | None) -> int:
        """Return the number of captions."""
        return len(captions(rows))

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over captions."""
        captions_read, head = read_captions(inputs), inputs.model.find(ConditionHead)
        conditions = head(captions_read.states, captions_read.embeddings)  # (N, L, W)
        targets = self._targets(inputs.model.find(ImageDecoder), [text.strip() for text in captions_read.texts])
        loss = self._distance(conditions, targets)
        if isinstance(head, RestoresStates):
            loss = loss + self._distance(head.restore(conditions), captions_read.states.detach())
        return loss.sum()

    def _distance(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the distance ``(N,)`` between two tensors ``(N, L, W)``."""
        difference = one.float() - other.to(one.device).float()
        return difference.norm(dim=-1).mean(-1) if self.distance == "norm" else difference.square().mean((-1, -2))

    @torch.no_grad()
    def _targets(self, decoder: ImageDecoder, texts: list[str]) -> Tensor:
        """Return the text encoder's output ``(N, L, W)``; it is computed for new texts, and cached up to a limit."""
        new = [text for text in dict.fromkeys(texts) if text not in self._cache]
        computed = dict(zip(new, decoder.encode(new), strict=True)) if new else {}
        conditions = {**computed, **{text: self._cache[text] for text in texts if text in self._cache}}
        for text, condition in computed.items():
            if (len(self._cache) + 1) * condition.numel() * condition.element_size() <= LIMIT:
                self._cache[text] = condition.clone()
        return torch.stack([conditions[text] for text in texts])


class ScoreDistillation:
    """An image decoder's denoising loss on images, conditioned on the head's output for their captions.

    The decoder is frozen, and the gradient passes through it to the head (Kosmos-G, arXiv:2310.02992, third stage):
    the head learns the condition that denoises the image best, whatever a text encoder would output.
    """

    needs = (LanguageModel, ConditionHead, Denoises)
    per_example = False

    def count(self, rows: Sequence[Sequence[Piece]], batch: Batch | None) -> int:
        """Return the number of captions that have an image before them."""
        return sum(image is not None for image, _ in captions(rows))

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over captions."""
        captions_read = read_captions(inputs)
        images = [image for row in inputs.rows for image in images_of(row)]
        pairs = [(row, images[index]) for row, index in enumerate(captions_read.images) if index is not None]
        if not pairs:
            raise MLLMError("No example of a batch has a caption after an image, which the condition is learned from.")
        rows = [row for row, _ in pairs]
        head = inputs.model.find(ConditionHead)
        conditions = head(captions_read.states[rows], captions_read.embeddings[rows])
        return inputs.model.find(Denoises).denoise([image for _, image in pairs], conditions).sum()
