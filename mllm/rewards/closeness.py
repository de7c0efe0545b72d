"""Reward answers that a guide finds similar to the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mllm.errors import MLLMError
from mllm.guides.contracts import Ask, Samples
from mllm.prompts.pieces import images_of
from mllm.slots import Scorer


class Closeness:
    """The similarity of the answer and its prompt's last image, by a scorer.

    Args:
        guide: the name of the scorer; None: the only one.
    """

    per_example = True
    reads_no_answer = True

    def __init__(self, *, guide: str | None = None) -> None:
        self.ask = Ask((Scorer,), guide)

    @property
    def asks(self) -> Sequence[Ask]:
        """Return the scorer."""
        return [self.ask]

    def __call__(self, samples: Samples) -> Tensor:
        """Return the similarities ``(N,)``.

        Raises:
            MLLMError: a prompt without an image.
        """
        scorer, texts = samples.model.guide(self.ask), list(samples.texts)
        images = [images_of(prompt)[-1:] for prompt in samples.prompts]
        if not all(images):
            raise MLLMError("The reward closeness compares an answer with an image, and a prompt has none.")
        firsts = [n for n in range(len(images)) if n == 0 or images[n][0] is not images[n - 1][0]]
        ends = [*firsts[1:], len(images)]
        return torch.cat(
            [
                scorer.image_text(images[first], texts[first:end])[0].float().cpu()
                for first, end in zip(firsts, ends, strict=True)
            ]
        )
