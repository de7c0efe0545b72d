"""Read captions: the language model's states at the tokens that stand for an image, behind each caption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mllm.errors import MLLMError
from mllm.model import Model
from mllm.prompts.batch import collate, encode
from mllm.prompts.pieces import Control, Piece, Target
from mllm.readout.tokens import image_tokens
from mllm.slots import Inputs

TOGETHER = 16  # captions that a CPU reads at once


class CaptionStates(NamedTuple):
    """The language model's output on captions, each with an image's r tokens behind it."""

    texts: list[str]
    images: list[int | None]  # index of each caption's image among the batch's; None: it has none
    tokens: tuple[str, ...]
    states: Tensor  # (N, r, D_lm) at the tokens
    embeddings: Tensor  # (N, r, D_lm) of the tokens
    logits: Tensor  # (N, V) of what follows the caption


def captions(rows: Sequence[Sequence[Piece]]) -> list[tuple[int | None, str]]:
    """Return every target: the index, among all rows' images, of the last one before it in its row, and the text."""
    targets: list[tuple[int | None, str]] = []
    images = 0
    for pieces in rows:
        image: int | None = None
        for piece in pieces:
            if isinstance(piece, Target):
                targets.append((image, piece.text))
            elif not isinstance(piece, str | Control):
                image, images = images, images + 1
    return targets


def read_captions(inputs: Inputs) -> CaptionStates:
    """Return the language model's states behind a batch's captions; they are computed once for all objectives.

    Raises:
        MLLMError: there is no caption, or no head that shows images.
    """
    if "captions" not in inputs.shared:
        tokens, targets = image_tokens(inputs.model), captions(inputs.rows)
        if not targets:
            raise MLLMError("No example of a batch has a caption, which a head that shows images learns from.")
        images, texts = map(list, zip(*targets, strict=True))
        inputs.shared["captions"] = CaptionStates(texts, images, tokens, *read_texts(inputs.model, texts))
    return inputs.shared["captions"]


def read_texts(model: Model, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Return states and embeddings ``(N, r, D_lm)`` of an image's tokens behind captions, and logits ``(N, V)`` before.

    On a CPU, where padding costs as much as words, captions of about one length are read together; but where a gradient
    is wanted at the last tokens alone, all are: for few positions, or many, the weights are gone through once.
    """
    tokens = image_tokens(model)
    count, behind = len(tokens), Control("".join(tokens))
    rows = [encode([model.spec.prompt.caption + text, behind], lm=model.lm, num_visual=0) for text in texts]
    at_the_end = torch.is_grad_enabled() and not model.lm_trains
    together = TOGETHER if model.device.type == "cpu" and not at_the_end else len(rows)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row].ids))
    chunks = []
    for start in range(0, len(rows), together):
        batch = collate([rows[row] for row in order[start : start + together]], model.lm.pad).to(model.device)
        length = batch.ids.shape[1]
        last = torch.arange(length - count - 1, length, device=model.device)
        # A gradient is wanted at the tokens and, for the first one's score, before them.
        fixed = length - count - 1 if at_the_end else 0
        embeds = model.lm.embed(batch.ids)
        states, logits = model.lm.read(embeds, batch.mask, last, fixed, num_logits=1)
        chunks.append((states[:, 1:], embeds[:, -count:], logits[:, 0]))
    back = torch.tensor(order, device=model.device).argsort()
    states, embeddings, logits = (torch.cat(each)[back] for each in zip(*chunks, strict=True))
    return states, embeddings, logits
