"""Align the model with a guide: the distance between what both make of an item."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from mllm.capabilities import SentenceModel
from mllm.devices import has_values
from mllm.errors import MLLMError
from mllm.guides.contracts import Ask, EmbedsImages, EmbedsTexts
from mllm.model import Model
from mllm.objectives.contrastive import captions_of
from mllm.prompts.batch import Batch
from mllm.prompts.pieces import Piece, images_of
from mllm.slots import Connector, Encoder, ImageDecoder, Inputs


class Align:
    """The distance between what the model makes of an image and what a guide makes of the image, or of its caption.

    The guide is asked in every step and is not trained. It makes one vector of an item, which is compared with the mean
    of the model's, or as many as the model, which are compared one by one.

    Args:
        what: what the model makes of an image: its ``visual`` tokens, or the encoder's ``features``.
        reads: what the guide reads of an item: its ``image``, or its ``text``, the caption.
        guide: the name of the guide; None: the only one that embeds what is read.
        distance: ``mse``, the mean squared error; or ``cosine``, 1 minus the cosine similarity.

    Raises:
        MLLMError: another word for one of these.
    """

    per_example = True

    def __init__(
        self,
        *,
        what: Literal["visual", "features"] = "visual",
        reads: Literal["image", "text"] = "image",
        guide: str | None = None,
        distance: Literal["mse", "cosine"] = "mse",
    ) -> None:
        for name, value, known in (
            ("what", what, ("visual", "features")),
            ("reads", reads, ("image", "text")),
            ("distance", distance, ("mse", "cosine")),
        ):
            if value not in known:
                raise MLLMError(f"The objective align has {name}={value!r}: expected {' or '.join(known)}.")
        self.what, self.reads, self.distance = what, reads, distance
        self.needs: tuple[type, ...] = (Encoder, Connector) if what == "visual" else (Encoder,)
        kinds = (EmbedsImages,) if reads == "image" else (EmbedsTexts, SentenceModel, ImageDecoder)
        self.ask = Ask(cast(tuple[type, ...], kinds), guide)

    @property
    def asks(self) -> Sequence[Ask]:
        """Return the guide that the model is aligned with."""
        return [self.ask]

    @property
    def reads_no_answer(self) -> bool:
        """Whether items need no captions."""
        return self.reads == "image"

    def problems(self, model: Model) -> list[str]:
        """Return whether the widths of both sides differ, as far as the guide says its own."""
        guide = model.guide(self.ask)
        width = model.width if self.what == "visual" else model.encoder.dim
        if not isinstance(guide, EmbedsImages) or guide.dim == width:
            return []
        change = " Set connector.width." if self.what == "visual" else ""
        return [f"the guide's vectors have the width {guide.dim}, and those of the model {width}.{change}"]

    def count(self, rows: Sequence[Sequence[Piece]], batch: Batch | None) -> int:
        """Return the number of images."""
        return sum(len(images_of(row)) for row in rows)

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over images."""
        tokens = inputs.overview if self.what == "visual" else inputs.features
        if tokens is None:
            raise MLLMError("The objective align compares images, and a batch has none. Train it on images.")
        guide = inputs.model.guide(self.ask)
        targets = self._targets(guide, inputs, tokens.detach()).to(tokens.device).float()
        if targets.dim() == 2:
            tokens, targets = tokens.mean(1, keepdim=True), targets[:, None]
        if tokens.shape != targets.shape:
            sides = [f"{shape[1]} vectors of width {shape[2]}" for shape in (tokens.shape, targets.shape)]
            raise MLLMError(
                f"The objective align compares {sides[0]} of an image with the guide's {sides[1]}: give the connector "
                "the tokens and the width of the guide, or take another guide."
            )
        if self.distance == "cosine":
            return (1 - cosine_similarity(tokens.float(), targets, dim=-1)).mean(1).sum()
        return (tokens.float() - targets).square().mean((1, 2)).sum()

    @torch.no_grad()
    def _targets(self, guide: Any, inputs: Inputs, like: Tensor) -> Tensor:
        """Return what the guide makes of the items, ``(I, D)`` or ``(I, K, D)``."""
        if not _has_weights(guide):  # in a plan: of the right form
            return torch.zeros_like(like)
        if self.reads == "image":
            return cast(Tensor, guide.embed_images([image for row in inputs.rows for image in images_of(row)]))
        return embedded(guide, captions_of(inputs.rows))


def embedded(guide: EmbedsTexts | SentenceModel | ImageDecoder, texts: Sequence[str]) -> Tensor:
    """Return a guide's vectors of texts, ``(N, D)``, or an image decoder's conditions ``(N, L, W)``."""
    if isinstance(guide, EmbedsTexts):
        return guide.embed_texts(texts)
    return guide.sentences(texts) if isinstance(guide, SentenceModel) else guide.encode(texts)


def _has_weights(guide: nn.Module) -> bool:
    return all(has_values(parameter) for parameter in guide.parameters())
