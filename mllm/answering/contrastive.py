"""Decoding that looks at the image: what the language model would have said without it is taken off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from mllm.prompts.batch import collate
from mllm.prompts.pieces import Piece


class Contrastive(LogitsProcessor):
    """Contrast with the image-free pass (arXiv:2403.05262, eq. 6; VCD, arXiv:2311.16922).

    Scores become ``(1 + alpha) * seen - alpha * blind``; tokens that are less than ``beta`` times as likely as the
    best one with the image are cut, so that the contrast cannot lift what is implausible.

    Args:
        model: the assembly.
        prompts: what is answered, a row each.
        alpha: how much of the blind scores is taken off.
        beta: the plausibility cut, 0 to 1.
    """

    def __init__(
        self, model: Any, prompts: Sequence[Sequence[Piece]], *, alpha: float = 0.5, beta: float = 0.1
    ) -> None:
        self._lm, self._alpha, self._cut = model.lm, alpha, math.log(beta) if beta else -math.inf
        batch = collate([model.encode(model.blind(prompt)) for prompt in prompts], model.lm.pad).to(model.device)
        self._mask = batch.mask
        self._cache, self._blind = self._lm.prefill(model.embed(None, batch), batch.mask)
        self._said = batch.ids[:, :0]  # of the answers
        self._started = False

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores ``(B, V)``."""
        if self._started:  # the blind pass follows what was chosen
            self._said = torch.cat([self._said, input_ids[:, -1:]], dim=1)
            self._blind = self._lm.step(self._cache, self._said, self._mask)
        self._started = True
        contrasted = (1 + self._alpha) * scores - self._alpha * self._blind.to(scores)
        return contrasted.masked_fill(scores < scores.amax(-1, keepdim=True) + self._cut, -math.inf)
