"""Learning to find images: a caption's state at a head's token, against images (FROMAGe, arXiv:2301.13823).

Notable: a caption is read as text alone, behind the recipe's caption prompt, with the tokens behind it that stand for
an image. All objectives on captions look at the same pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.nn.functional import cross_entropy, pad

from mllm.errors import MLLMError
from mllm.objective import Inputs
from mllm.prompt import Batch, Control, Piece, Target, collate, encode

HEAD = "retrieval"
TOGETHER = 16  # captions that a CPU reads at once


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


def token_id(model: Any) -> int:
    """Return the id of the retrieval head's token.

    Raises:
        MLLMError: the model has no such head, or its tokens do not hold the head's.
    """
    if HEAD not in model.heads:
        raise MLLMError("This model has no retrieval head. Add heads: [{type: retrieval}] and tokens: ['[RET]'].")
    known_tokens(model)
    return int(model.lm.new_tokens[model.heads[HEAD].token])


def known_tokens(model: Any) -> tuple[str, ...]:
    """Return the tokens that stand for an image, held against the language model's.

    Raises:
        MLLMError: no head reads tokens, or its tokens are not the language model's, or those of other heads.
    """
    tokens = model.image_tokens
    if tokens is None:
        raise MLLMError("This model has no head that shows images. Add one, and its tokens (docs/retrieval.md).")
    for name, head in model.heads.items():
        own = getattr(head, "tokens", None) or [getattr(head, "token", tokens[0])]
        if missing := [token for token in own if token not in model.lm.new_tokens]:
            known = [*model.lm.new_tokens]
            raise MLLMError(f"The head {name} reads the token {missing[0]!r}, and tokens is {known}. Add it there.")
        if not {*own} <= {*tokens}:
            raise MLLMError(f"The head {name} reads {own[0]!r}, and an image's tokens are {[*tokens]}: set its token.")
    return tuple(tokens)


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
        states, logits = model.lm.read(embeds, batch.mask, last, fixed, said=1)
        found.append((states[:, 1:], embeds[:, -count:], logits[:, 0]))
    back = torch.tensor(order, device=model.device).argsort()
    states, embeddings, logits = (torch.cat(each)[back] for each in zip(*found, strict=True))
    return states, embeddings, logits


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
