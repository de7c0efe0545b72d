"""Learning to make images: a head's condition against what a decoder's own text encoder says, or by its own loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mllm.errors import MLLMError
from mllm.prompts.batch import Batch
from mllm.prompts.pieces import Piece, images_of
from mllm.readout.states import captions, read_captions
from mllm.slots import Inputs

LIMIT = 2 * 2**30  # bytes of conditions that are kept


class Distillation:
    """The distance of a head's condition from the frozen text encoder's output for the caption.

    No image is looked at. What the text encoder says is computed once for a caption.

    Args:
        distance: ``norm``, the mean over the condition's L vectors of their Euclidean distance (GILL,
            arXiv:2305.17216); or ``squared``, the mean square (Kosmos-G, arXiv:2310.02992). A head that restores the
            language model's states from the condition is held against those by the same distance.
    """

    needs = ("lm", "tokens", "painter", "decoder")

    def __init__(self, *, distance: Literal["norm", "squared"] = "norm") -> None:
        self.distance = distance
        self._known: dict[str, Tensor] = {}

    def count(self, rows: Sequence[Sequence[Piece]], batch: Batch | None) -> int:
        """Return the number of captions."""
        return len(captions(rows))

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over captions."""
        said, head = read_captions(inputs), inputs.model.painter
        made = head(said.states, said.embeddings)  # (N, L, W)
        loss = self._apart(made, self._wanted(inputs.model.decoder, [text.strip() for text in said.texts]))
        if hasattr(head, "restore"):
            loss = loss + self._apart(head.restore(made), said.states.detach())
        return loss.sum()

    def _apart(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the distance ``(N,)`` of ``(N, L, W)`` and the same."""
        difference = one.float() - other.to(one.device).float()
        return difference.norm(dim=-1).mean(-1) if self.distance == "norm" else difference.square().mean((-1, -2))

    @torch.no_grad()
    def _wanted(self, decoder: object, texts: list[str]) -> Tensor:
        """Return the text encoder's output ``(N, L, W)``, that of new texts computed and, up to a limit, kept."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        found = dict(zip(new, decoder.encode(new), strict=True)) if new else {}  # type: ignore[attr-defined]
        known = {**found, **{text: self._known[text] for text in texts if text in self._known}}
        for text, condition in found.items():
            if (len(self._known) + 1) * condition.numel() * condition.element_size() <= LIMIT:
                self._known[text] = condition.clone()
        return torch.stack([known[text] for text in texts])


class ScoreDistillation:
    """An image decoder's own loss on images, under the condition that a head makes of their captions.

    The decoder is frozen, and the gradient passes through it (Kosmos-G, arXiv:2310.02992, its third stage): what the
    head has to say is what helps to take noise off the image, whatever a text encoder would say.
    """

    needs = ("lm", "tokens", "painter", "decoder.denoise")

    def count(self, rows: Sequence[Sequence[Piece]], batch: Batch | None) -> int:
        """Return the number of captions that have an image before them."""
        return sum(place is not None for place, _ in captions(rows))

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over captions."""
        said = read_captions(inputs)
        images = [image for row in inputs.rows for image in images_of(row)]
        pairs = [(row, images[place]) for row, place in enumerate(said.images) if place is not None]
        if not pairs:
            raise MLLMError("No example of a batch has a caption behind an image, which the condition is learnt from.")
        own = [row for row, _ in pairs]
        conditions = inputs.model.painter(said.states[own], said.embeddings[own])
        losses: Tensor = inputs.model.decoder.denoise([image for _, image in pairs], conditions)
        return losses.sum()
