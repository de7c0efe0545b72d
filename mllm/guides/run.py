"""Ask another run: what its encoder and its connector make of images, and its sentence encoder of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mllm.capabilities import SentenceModel
from mllm.errors import MLLMError
from mllm.model import Model
from mllm.slots import Connector

_BATCH = 64


class Run(nn.Module):
    """A guide that returns a run's visual tokens.

    Args:
        model: the model; in a recipe, the path of its run.

    Raises:
        MLLMError: the model has no connector, or one without a width.
    """

    def __init__(self, *, model: Model) -> None:
        super().__init__()
        self.model = model
        if not model.has(Connector) or model.width is None:
            raise MLLMError(
                "The run makes no visual tokens: it has no connector, or neither a language model nor connector.width. "
                "Give another run."
            )
        self._width = model.width

    @property
    def dim(self) -> int:
        """Return the width of the visual tokens."""
        return self._width

    @torch.no_grad()
    def embed_images(self, images: Sequence[Any]) -> Tensor:
        """Return the visual tokens ``(I, Q, D)`` of whole images."""
        chunks = [images[start : start + _BATCH] for start in range(0, len(images), _BATCH)]
        return torch.cat([self.model.overview(chunk).float() for chunk in chunks])


class SentenceRun(Run):
    """A guide that also embeds texts: the run's language model is a sentence encoder."""

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return vectors ``(N, D)`` of length 1; a text that is too long is truncated."""
        vectors: Tensor = self.model.lm.sentences(texts).float()
        return vectors


def run(*, model: Model) -> Run:
    """Return a `Run`; with a sentence encoder, a `SentenceRun`. The argument is that of `Run`."""
    return SentenceRun(model=model) if model.has(SentenceModel) else Run(model=model)
