"""Read captions: compute the language model's states at the tokens that stand for an image, after each caption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mllm.errors import MLLMError
from mllm.model import Model
from mllm.prompts.batch import collate, encode
from mllm.prompts.pieces import Control, Piece, Target, is_image
from mllm.readout.tokens import image_tokens
from mllm.slots import Inputs

TOGETHER = 16  # captions of a batch on a CPU


class CaptionStates(NamedTuple):
    """The language model's output on captions, each followed by an image's r tokens."""

    texts: list[str]
    images: list[int | None]  # index of each caption's image in the batch; None: it has none
    tokens: tuple[str, ...]
    states: Tensor  # (N, r, D_lm) at the tokens
    embeddings: Tensor  # (N, r, D_lm) of the tokens
    logits: Tensor  # (N, V) of the token after the caption


def captions(rows: Sequence[Sequence[Piece]]) -> list[tuple[int | None, str]]:
    """Return every target's text with the index, in the batch, of the last image before it in its row, or None."""
    targets: list[tuple[int | None, str]] = []
    images = 0
    for pieces in rows:
        image: int | None = None
        for piece in pieces:
            if isinstance(piece, Target):
                targets.append((image, piece.text))
            elif is_image(piece):
                image, images = images, images + 1
    return targets


def read_captions(inputs: Inputs) -> CaptionStates:
    """Return the language model's states after a batch's captions; they are computed once for all objectives.

    Raises:
        MLLMError: the batch has no caption, or the model no head that shows images.
    """
    if "captions" not in inputs.shared:
        tokens, targets = image_tokens(inputs.model), captions(inputs.rows)
        if not targets:
            raise MLLMError(
                "No example of a batch has a caption, which a head that shows images learns from. Check the data."
            )
        images, texts = map(list, zip(*targets, strict=True))
        inputs.shared["captions"] = CaptionStates(texts, images, tokens, *read_texts(inputs.model, texts))
    return inputs.shared["captions"]


def read_texts(model: Model, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Return states and embeddings ``(N, r, D_lm)`` of an image's tokens after captions, and logits ``(N, V)`` before.

    On a CPU, where padding tokens cost as much as others, captions of similar length share a batch. Where a gradient is
    needed at the last tokens alone, all captions are one batch: the weights are then read once, for few positions.
    """
    tokens = image_tokens(model)
    count, suffix = len(tokens), Control("".join(tokens))
    rows = [encode([model.spec.prompt.caption + text, suffix], lm=model.lm, num_visual=0) for text in texts]
    only_last = torch.is_grad_enabled() and not model.lm_trains  # a gradient is needed at the last tokens alone
    batch_size = TOGETHER if model.device.type == "cpu" and not only_last else len(rows)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row].ids))
    chunks = []
    for start in range(0, len(rows), batch_size):
        batch = collate([rows[row] for row in order[start : start + batch_size]], model.lm.pad).to(model.device)
        length = batch.ids.shape[1]
        last = torch.arange(length - count - 1, length, device=model.device)
        # A gradient is needed at the tokens and, for the first one's logit, at the position before them.
        fixed = length - count - 1 if only_last else 0
        embeds = model.lm.embed(batch.ids)
        states, logits = model.lm.read(embeds, batch.mask, last, fixed, num_logits=1)
        chunks.append((states[:, 1:], embeds[:, -count:], logits[:, 0]))
    inverse = torch.tensor(order, device=model.device).argsort()
    states, embeddings, logits = (torch.cat(each)[inverse] for each in zip(*chunks, strict=True))
    return states, embeddings, logits
