"""A head's conditions in closed form: from states behind captions to what the decoder's text encoder says of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from mllm.fits.base import Material, Ridge
from mllm.prompts.pieces import answer_text
from mllm.readout.states import read_texts

HEAD = "affine"


class Conditions(Ridge):
    """Sets the head's map. Each caption counts once; no picture is opened."""

    def __init__(self, *, strength: float = 0.01, chunk: int = 256) -> None:
        super().__init__(strength=strength, chunk=chunk)

    def problems(self, model: Any) -> list[str]:
        """Return what the model has not that this needs, and what to give."""
        if HEAD in model.heads and model.draws:
            return []
        return [f"fits conditions: give heads: [{{type: {HEAD}}}] and a decoder."]

    def project(self, model: Any) -> nn.Linear:
        """Return the head's map."""
        project: nn.Linear = model.heads[HEAD].project
        return project

    def rows(self, model: Any, data: Material) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield captions' states ``(N, r D_lm)`` and the text encoder's output ``(N, L W)``."""
        texts = list(dict.fromkeys(text.strip() for item in data.captioned for text in item.answers))
        for start in data.track(range(0, len(texts), self.chunk)):
            part = texts[start : start + self.chunk]
            states, _, _ = read_texts(model, [answer_text(text) for text in part])
            yield states.flatten(1).float(), model.decoder.encode(part).flatten(1).float()
