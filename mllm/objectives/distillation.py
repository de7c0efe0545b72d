"""Learning to make images: a head's condition against what a decoder's own text encoder says, or by its own loss."""

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

LIMIT = 2 * 2**30  # bytes of conditions that are kept


class Distillation:
    """The distance of a head's condition from the frozen text encoder's output for the caption.

    No image is looked at. What the text encoder says is computed once for a caption.

    Args:
        distance: ``norm``, the mean over the condition's L vectors of their Euclidean distance (GILL,
            arXiv:2305.17216); or ``squared``, the mean square (Kosmos-G, arXiv:2310.02992). A head that restores the
            language model's states from the condition is held against those by the same distance.
    """

    needs = (LanguageModel, ConditionHead, ImageDecoder)
    per_example = False

    def __init__(self, *, distance: Literal["norm", "squared"] = "norm") -> None:
        self.distance = distance
        self._known: dict[str, Tensor] = {}

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
        """Return the distance ``(N,)`` of ``(N, L, W)`` and the same."""
        difference = one.float() - other.to(one.device).float()
        return difference.norm(dim=-1).mean(-1) if self.distance == "norm" else difference.square().mean((-1, -2))

    @torch.no_grad()
    def _targets(self, decoder: ImageDecoder, texts: list[str]) -> Tensor:
        """Return the text encoder's output ``(N, L, W)``, that of new texts computed and, up to a limit, kept."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        computed = dict(zip(new, decoder.encode(new), strict=True)) if new else {}
        known = {**computed, **{text: self._known[text] for text in texts if text in self._known}}
        for text, condition in computed.items():
            if (len(self._known) + 1) * condition.numel() * condition.element_size() <= LIMIT:
                self._known[text] = condition.clone()
        return torch.stack([known[text] for text in texts])


class ScoreDistillation:
    """An image decoder's own loss on images, under the condition that a head makes of their captions.

    The decoder is frozen, and the gradient passes through it (Kosmos-G, arXiv:2310.02992, its third stage): what the
    head has to say is what helps to take noise off the image, whatever a text encoder would say.
    """

    needs = (LanguageModel, ConditionHead, Denoises)
    per_example = False

    def count(self, rows: Sequence[Sequence[Piece]], batch: Batch | None) -> int:
        """Return the number of captions that have an image before them."""
        return sum(place is not None for place, _ in captions(rows))

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over captions."""
        captions_read = read_captions(inputs)
        images = [image for row in inputs.rows for image in images_of(row)]
        pairs = [(row, images[index]) for row, index in enumerate(captions_read.images) if index is not None]
        if not pairs:
            raise MLLMError("No example of a batch has a caption behind an image, which the condition is learned from.")
        rows = [row for row, _ in pairs]
        head = inputs.model.find(ConditionHead)
        conditions = head(captions_read.states[rows], captions_read.embeddings[rows])
        return inputs.model.find(Denoises).denoise([image for _, image in pairs], conditions).sum()
