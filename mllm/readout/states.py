"""The language model's states at a head's tokens, behind captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mllm.errors import MLLMError
from mllm.prompts.batch import collate, encode
from mllm.prompts.pieces import Control, Piece, Target
from mllm.readout.tokens import known_tokens
from mllm.slots import Inputs

TOGETHER = 16  # captions that a CPU reads at once


class Said(NamedTuple):
    """Captions as the language model read them, with an image's r tokens behind each."""

    texts: list[str]
    images: list[int | None]  # the place of each caption's image among the batch's; None: it has none
    tokens: tuple[str, ...]
    states: Tensor  # (N, r, D_lm) at the tokens
    embeddings: Tensor  # (N, r, D_lm) of the tokens
    logits: Tensor  # (N, V) of what follows the caption


def captions(rows: Sequence[Sequence[Piece]]) -> list[tuple[int | None, str]]:
    """Return every target: the place, among all rows' images, of the last one before it in its row, and the text."""
    found: list[tuple[int | None, str]] = []
    place = -1
    for pieces in rows:
        seen = False
        for piece in pieces:
            if isinstance(piece, Target):
                found.append((place if seen else None, piece.text))
            elif not isinstance(piece, str | Control):
                place, seen = place + 1, True
    return found


def read_captions(inputs: Inputs) -> Said:
    """Return what the language model made of a batch's captions; it reads them once for all objectives.

    Raises:
        MLLMError: there is no caption, or a head's tokens are not among the model's.
    """
    if "said" not in inputs.shared:
        model = inputs.model
        tokens = known_tokens(model)
        found = captions(inputs.rows)
        if not found:
            raise MLLMError("No example of a batch has a caption, which a head that shows images learns from.")
        places, texts = map(list, zip(*found, strict=True))
        inputs.shared["said"] = Said(texts, places, tokens, *read_texts(model, texts))
    return inputs.shared["said"]


def read_texts(model: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Return states and embeddings ``(N, r, D_lm)`` of an image's tokens behind captions, and logits ``(N, V)`` before.

    On a CPU, where padding costs as much as words, captions of about one length are read together; but where a gradient
    is wanted at the last tokens alone, all are: for few positions, or many, the weights are gone through once.
    """
    tokens = known_tokens(model)
    count, behind = len(tokens), Control("".join(tokens))
    rows = [encode([model.spec.prompt.caption + text, behind], lm=model.lm, num_visual=0) for text in texts]
    at_the_end = torch.is_grad_enabled() and not model.adapts
    together = TOGETHER if model.device.type == "cpu" and not at_the_end else len(rows)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row].ids))
    found = []
    for start in range(0, len(rows), together):
        batch = collate([rows[row] for row in order[start : start + together]], model.lm.pad).to(model.device)
        length = batch.ids.shape[1]
        last = torch.arange(length - count - 1, length, device=model.device)
        # A gradient is wanted at the tokens and, for the first one's score, before them.
        fixed = length - count - 1 if at_the_end else 0
        embeds = model.lm.embed(batch.ids)
        states, logits = model.lm.read(embeds, batch.mask, last, fixed, num_logits=1)
        found.append((states[:, 1:], embeds[:, -count:], logits[:, 0]))
    back = torch.tensor(order, device=model.device).argsort()
    states, embeddings, logits = (torch.cat(each)[back] for each in zip(*found, strict=True))
    return states, embeddings, logits
