"""Keep the language model near its frozen self: the KL divergence of next-token distributions, adapters on and off."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from mllm.errors import MLLMError
from mllm.guides.contracts import Ask
from mllm.model import Model
from mllm.objectives.caption import Caption
from mllm.prompts.batch import IGNORED, Batch, Encoded, collate
from mllm.prompts.pieces import Piece
from mllm.slots import Inputs, LanguageModel

TRAINS = (
    "the language model trains, so it is no base to stay near to. Name one, guide: NAME, with guides: {NAME: {type: "
    "transformers, model: ...}}, or train adapters."
)


class KLToBase:
    """The KL divergence of the model's next-token distribution from the base's, at each target.

    The base is the frozen language model, adapters and new tokens off, or a guide with the same vocabulary. It reads
    the text alone. So without ``images`` this keeps what the language model does with text; with them it keeps the text
    that the images give rise to likely as text.

    Args:
        images: whether the model's side reads the images, too.
        guide: the name of a language model that is the base; None: the model's own.
    """

    needs = (LanguageModel,)
    per_example = True

    def __init__(self, *, images: bool = False, guide: str | None = None) -> None:
        self.images = images
        self.ask = None if guide is None else Ask((LanguageModel,), guide)

    @property
    def asks(self) -> Sequence[Ask]:
        """Return the base, where it is a guide."""
        return [] if self.ask is None else [self.ask]

    def problems(self, model: Model) -> list[str]:
        """Return that the language model trains, where it would be its own base."""
        return [TRAINS] if self.ask is None and model.spec.trains("lm") else []

    def count(self, rows: Sequence[Sequence[Piece]], batch: Batch | None) -> int:
        """Return the number of target tokens."""
        return Caption().count(rows, batch)

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over target tokens."""
        model, batch = inputs.model, inputs.batch
        assert batch is not None
        text = text_of(batch, model.lm)
        log_p = target_logits(model.lm, model.embed(inputs.visual, batch), batch) if self.images else None
        return kl_to_base(model, text, log_p, None if self.ask is None else model.guide(self.ask)).sum()


def kl_to_base(model: Model, text: Batch, logits: Tensor | None = None, base: Any = None) -> Tensor:
    """Return the KL divergence ``(N,)`` from the base at each target.

    Args:
        model: the model.
        text: the sequences without images.
        logits: the model's, ``(N, V)``, of the sequences with images; None: of ``text``.
        base: another language model; None: the model's own, adapters and new tokens off.
    """
    if logits is None:
        logits = target_logits(model.lm, model.lm.embed(text.ids), text)
    with torch.no_grad(), model.adapters_off() if base is None else nullcontext():
        lm = model.lm if base is None else base
        other = target_logits(lm, lm.embed(text.ids), text)
    words = min(logits.shape[1], other.shape[1])  # new tokens are off in the base
    if base is not None and other.shape[1] != logits.shape[1] - len(model.lm.new_tokens):
        raise MLLMError("The base has another vocabulary than the language model: give one with the same tokenizer.")
    log_p, log_q = (each[:, :words].float().log_softmax(-1) for each in (logits, other))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def target_logits(lm: Any, embeds: Any, batch: Batch) -> Tensor:
    """Return the logits ``(N, V)`` of each target of a batch, row by row."""
    chosen = batch.labels[:, 1:] != IGNORED
    keep = chosen.any(0).nonzero().squeeze(1)  # positions before a target
    logits: Tensor = lm.logits(embeds, batch.mask, keep)
    return logits[chosen[:, keep]]


def text_of(batch: Batch, lm: Any) -> Batch:
    """Return a batch's rows without visual tokens, each with a token before its first target.

    Raises:
        MLLMError: rows hold several examples.
    """
    if batch.mask.dim() == 3:
        raise MLLMError("kl-to-base compares one example a row: leave out data.pack.")
    rows = []
    for ids, mask, visual, labels in zip(batch.ids, batch.mask, batch.visual, batch.labels, strict=True):
        kept = mask.bool() & ~visual
        text, targets = ids[kept].tolist(), labels[kept].tolist()
        if targets and targets[0] != IGNORED:
            text, targets = [lm.eos, *text], [IGNORED, *targets]
        rows.append(Encoded(text, [False] * len(text), targets))
    return collate(rows, lm.pad).to(batch.ids.device)
