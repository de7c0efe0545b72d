"""Reward answers that are likely as text, without the image."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from mllm.guides.contracts import Ask, Samples
from mllm.objectives.kl_to_base import text_of
from mllm.prompts.batch import IGNORED, collate, encode
from mllm.prompts.pieces import Target, answer_text, without_images
from mllm.slots import LanguageModel


class Fluency:
    """The mean log-likelihood of an answer's tokens after the text of its prompt.

    Args:
        guide: the name of a language model; None: the model's own, adapters and new tokens off.
    """

    per_example = True
    reads_no_answer = True

    def __init__(self, *, guide: str | None = None) -> None:
        self.ask = None if guide is None else Ask((LanguageModel,), guide)

    @property
    def asks(self) -> Sequence[Ask]:
        """Return the language model, where it is a guide."""
        return [] if self.ask is None else [self.ask]

    @torch.no_grad()
    def __call__(self, samples: Samples) -> Tensor:
        """Return the mean log-likelihoods ``(N,)``; 0 for an empty answer."""
        model = samples.model
        lm = model.lm if self.ask is None else model.guide(self.ask)
        pairs = zip(samples.prompts, samples.texts, strict=True)
        rows = [
            [*without_images(prompt), Target(answer_text(text) if text else "", ends=False)] for prompt, text in pairs
        ]
        batch = text_of(collate([encode(row, lm=lm, num_visual=0) for row in rows], lm.pad).to(model.device), lm)
        with model.adapters_off() if self.ask is None else nullcontext():
            losses = lm.losses(lm.embed(batch.ids), batch.mask, batch.labels).float()
        counts = (batch.labels[:, 1:] != IGNORED).sum(1).tolist()
        return torch.stack([-each.mean() if len(each) else each.sum() for each in losses.split(counts)]).cpu()
