"""Contrastive decoding: subtract the logits that the language model has without the image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from mllm.answering.decode import image_free_prompt
from mllm.answering.shared import prefilled
from mllm.model import Model
from mllm.prompts.batch import collate
from mllm.prompts.pieces import Piece


class Contrastive(LogitsProcessor):
    """Contrast with the image-free pass (arXiv:2403.05262, eq. 6; VCD, arXiv:2311.16922).

    Scores become ``(1 + alpha) * with_image - alpha * without_image``; tokens that are less than ``beta`` times as
    likely as the best one with the image are excluded, so that the contrast cannot raise implausible ones.

    Args:
        model: the model.
        prompts: one for each row.
        alpha: the weight of the image-free scores.
        beta: the plausibility threshold, 0 to 1.
    """

    def __init__(
        self, model: Model, prompts: Sequence[Sequence[Piece]], *, alpha: float = 0.5, beta: float = 0.1
    ) -> None:
        self._lm, self._alpha, self._threshold = model.lm, alpha, math.log(beta) if beta else -math.inf
        batch = collate([model.encode(image_free_prompt(model, prompt)) for prompt in prompts], model.lm.pad).to(
            model.device
        )
        self._mask = batch.mask
        self._cache, self._blind = prefilled(model, model.embed(None, batch), batch)
        self._answers = batch.ids[:, :0]
        self._started = False

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores ``(B, V)``."""
        if self._started:  # the image-free pass follows the tokens that were chosen
            self._answers = torch.cat([self._answers, input_ids[:, -1:]], dim=1)
            self._blind = self._lm.step(self._cache, self._answers, self._mask)
        self._started = True
        contrasted = (1 + self._alpha) * scores - self._alpha * self._blind.to(scores)
        return contrasted.masked_fill(scores < scores.amax(-1, keepdim=True) + self._threshold, -math.inf)
