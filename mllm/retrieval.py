"""Learning to find images: a caption's state at a head's token, against images (FROMAGe, arXiv:2301.13823).

Notable: a caption is read as text alone, behind the recipe's caption prompt, with the token behind it. Both objectives
here look at the same pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.nn.functional import cross_entropy, pad

from mllm.errors import MLLMError
from mllm.objectives import Inputs
from mllm.prompt import Batch, Control, Encoded, Piece, Target, collate, encode

HEAD = "retrieval"
TOGETHER = 16  # captions that a CPU reads at once


class Contrast:
    """InfoNCE between captions and images, the mean of both directions; negatives come from all processes."""

    needs = ("lm", "encoder", "tokens", f"heads.{HEAD}")

    def count(self, rows: Sequence[Sequence[Piece]], batch: Batch | None) -> int:
        """Return the number of captions that have an image before them."""
        return len(captions(rows))

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over captions."""
        head = inputs.model.heads[HEAD]
        said = _said(inputs)
        assert inputs.features is not None
        texts = head.of_states(said.states)  # (N, D)
        images = head.of_features(inputs.features[said.images])  # (N, D)
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
    """The negative log-likelihood of a head's token behind a caption: when to show an image."""

    needs = ("lm", "tokens", f"heads.{HEAD}")

    def count(self, rows: Sequence[Sequence[Piece]], batch: Batch | None) -> int:
        """Return the number of captions that have an image before them."""
        return len(captions(rows))

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over captions."""
        logits = _said(inputs).logits.float()
        wanted = torch.full((len(logits),), token_id(inputs.model), device=logits.device)
        return cross_entropy(logits, wanted, reduction="sum")


class Said(NamedTuple):
    """Captions as the language model read them, with the token behind each."""

    images: list[int]  # the place of each caption's image among the batch's
    states: Tensor  # (N, D_lm) at the token
    logits: Tensor  # (N, V) of what follows the caption


def captions(rows: Sequence[Sequence[Piece]]) -> list[tuple[int, str]]:
    """Return every target that has an image before it: that image's place among all of the rows, and the text."""
    found, place = [], -1
    for pieces in rows:
        seen = False
        for piece in pieces:
            if isinstance(piece, Target):
                found += [(place, piece.text)] if seen else []
            elif not isinstance(piece, str | Control):
                place, seen = place + 1, True
    return found


def token_id(model: Any) -> int:
    """Return the id of the head's token.

    Raises:
        MLLMError: the model has no such head, or its tokens do not hold the head's.
    """
    if HEAD not in model.heads:
        raise MLLMError("This model has no retrieval head. Add heads: [{type: retrieval}] and tokens: ['[RET]'].")
    token = model.heads[HEAD].token
    if token not in model.lm.new_tokens:
        raise MLLMError(f"The head reads the token {token!r}, and tokens is {[*model.lm.new_tokens]}. Add it there.")
    return int(model.lm.new_tokens[token])


def _said(inputs: Inputs) -> Said:
    """Return what the language model made of a batch's captions; it reads them once for all objectives."""
    if "said" not in inputs.shared:
        model = inputs.model
        token_id(model)
        found = captions(inputs.rows)
        if not found:
            raise MLLMError("No example of a batch has a caption behind an image, which the head learns from.")
        places, texts = zip(*found, strict=True)
        token = Control(model.heads[HEAD].token)
        rows = [encode([model.spec.prompt.caption + text, token], lm=model.lm, num_visual=0) for text in texts]
        inputs.shared["said"] = Said(list(places), *_read(model, rows))
    return inputs.shared["said"]


def _read(model: Any, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """Return the states ``(N, D_lm)`` at the last token of each row, and the logits ``(N, V)`` before it.

    On a CPU, where padding costs as much as words, captions of about one length are read together.
    """
    together = TOGETHER if model.device.type == "cpu" else len(rows)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row].ids))
    states, logits = [], []
    for start in range(0, len(rows), together):
        batch = collate([rows[row] for row in order[start : start + together]], model.lm.pad).to(model.device)
        length = batch.ids.shape[1]
        last = torch.tensor([length - 2, length - 1], device=model.device)
        fixed = 0 if model.adapts else length - 2  # a gradient is wanted at the token and, for its own score, before it
        read = model.lm.read(model.lm.embed(batch.ids), batch.mask, last, fixed)
        states.append(read[0][:, 1])
        logits.append(read[1][:, 0])
    back = torch.tensor(order, device=model.device).argsort()
    return torch.cat(states)[back], torch.cat(logits)[back]


def gathered(own: Tensor) -> tuple[Tensor, int]:
    """Return all processes' rows of ``own (n, D)``, n their own each, and where this one's start.

    A gradient of what comes back reaches every process' rows.
    """
    number = torch.tensor([len(own)], device=own.device)
    sizes = [torch.empty_like(number) for _ in range(distributed.get_world_size())]
    distributed.all_gather(sizes, number)
    counts = [int(size) for size in sizes]
    widest = max(counts)
    rows: Tensor = _Gather.apply(pad(own, (0, 0, 0, widest - len(own))))  # type: ignore[no-untyped-call]
    every = torch.cat([part[:count] for part, count in zip(rows.split(widest), counts, strict=True)])
    return every, sum(counts[: distributed.get_rank()])


class _Gather(torch.autograd.Function):
    """All processes' rows, of as many each."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        distributed.all_reduce(gradient)
        return gradient.chunk(distributed.get_world_size())[distributed.get_rank()]
