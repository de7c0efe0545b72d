"""When no image is to be shown: its tokens stay unlikely within captions, and in the language model's own texts.

Behind a caption that stands alone an image's first token learns to be said (`mllm.objectives.retrieval`). Nothing in
that keeps it from being said elsewhere, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mllm.errors import MLLMError
from mllm.objective import Inputs
from mllm.objectives.retrieval import captions
from mllm.prompt import IGNORED, Batch, Encoded, Piece, Target, answer_text, collate


class Silence:
    """The negative log-likelihood of texts that hold no image: of captions' words, and of the model's own texts.

    Its own texts are sampled when the first batch comes, from the language model as it is without what is learnt: no
    data is needed. While nothing in it trains, all that this can teach is not to say the new tokens.

    Args:
        texts: of its own that are sampled.
        length: of each, in tokens, at most.
        together: of the batch's captions, and of its own texts, that a step looks at, drawn each time.
    """

    needs = ("lm", "tokens", "image_tokens")

    def __init__(self, *, texts: int = 32, length: int = 24, together: int = 4) -> None:
        if min(texts, length, together) < 1:
            raise MLLMError(
                f"silence: texts {texts}, length {length}, together {together}: expected 1 or more of each."
            )
        self._texts, self._length, self._together = texts, length, together
        self._own: list[Encoded] = []

    def count(self, rows: Sequence[Sequence[Piece]], batch: Batch | None) -> int:
        """Return the number of captions."""
        return len(captions(rows))

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the mean over the captions' tokens, and that over its own texts', times the captions."""
        model, texts = inputs.model, [text for _, text in captions(inputs.rows)]
        if not texts:
            raise MLLMError("No example of a batch has a caption, within which no image is to be shown.")
        if any(path.split(".")[0] == "lm" for path in model.spec.trained):
            raise MLLMError(
                "silence keeps to what the language model says by itself, and here it trains. Leave it out."
            )
        self._own = self._own or own_texts(model, self._texts, self._length)
        before = model.spec.prompt.caption
        said = [model.encode([before, Target(answer_text(text), ends=False)]) for text in self._drawn(texts)]
        return (_mean(model, said) + _mean(model, self._drawn(self._own))) * len(texts)

    def _drawn(self, texts: Sequence[Any]) -> list[Any]:
        """Return some of the texts, by torch's own generator: a resumed run goes on with it."""
        return [texts[place] for place in torch.randperm(len(texts))[: self._together]]


@torch.no_grad()
def own_texts(model: Any, number: int, length: int) -> list[Encoded]:
    """Return texts that a model's language model says by itself, of so many tokens at most, sampled each by its seed.

    What stands inside it, and new tokens, are left out.
    """
    start = list(model.lm.bos) or [model.lm.eos]
    ids = torch.tensor([start] * number, device=model.device)
    settings = [{"max_new_tokens": length, "temperature": 1.0, "seed": seed} for seed in range(number)]
    with model.adapters_off():
        found = model.lm.generate(torch.ones_like(ids), settings, input_ids=ids)
    return [
        Encoded([*start, *said], [False] * (len(start) + len(said)), [IGNORED] * len(start) + list(said))
        for said in found
    ]


def _mean(model: Any, rows: Sequence[Encoded]) -> Tensor:
    """Return the mean negative log-likelihood of rows' targets."""
    batch = collate(rows, model.lm.pad).to(model.device)
    losses: Tensor = model.lm.losses(model.lm.embed(batch.ids), batch.mask, batch.labels)
    return losses.mean()
