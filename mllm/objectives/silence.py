"""When no image is to be shown: its tokens stay unlikely within captions, and in the language model's own texts.

Behind a caption that stands alone an image's first token learns to be said (`mllm.objectives.retrieval`). Nothing in
that keeps it from being said elsewhere, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mllm.data.items import SEPARATOR
from mllm.errors import MLLMError
from mllm.objective import Inputs
from mllm.objectives.retrieval import captions, known_tokens
from mllm.prompt import IGNORED, Batch, Control, Encoded, Piece, Target, answer_text, collate


class Silence:
    """The negative log-likelihood of texts where no image is: a caption's words, what follows its image, its own texts.

    The model's own texts are sampled when the first batch comes, from the language model as it is without what is
    learnt: no data is needed. They are read by themselves, and behind a caption and its image, where tokens that were
    just said are easily said again. While nothing in the language model trains, all that this can teach is not to say
    them.

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
        """Return the mean over the texts' tokens, times the captions."""
        model, found = inputs.model, [text for _, text in captions(inputs.rows)]
        if not found:
            raise MLLMError("No example of a batch has a caption, within which no image is to be shown.")
        if any(path.split(".")[0] == "lm" for path in model.spec.trained):
            raise MLLMError(
                "silence keeps to what the language model says by itself, and here it trains. Leave it out."
            )
        self._own = self._own or own_texts(model, self._texts, self._length)
        own = self._drawn(self._own)
        shown = [_shown(model, text, other) for text, other in zip(self._drawn(found), own, strict=False)]
        batch = collate([*shown, *own], model.lm.pad).to(model.device)
        embeds = model.lm.embed(batch.ids).detach()  # what a token does to the states behind it is not at stake
        losses: Tensor = model.lm.losses(embeds, batch.mask, batch.labels)
        return losses.mean() * len(found)

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


def _shown(model: Any, caption: str, own: Encoded) -> Encoded:
    """Return a caption, its image's tokens, and a text of the model's own on a new line."""
    first = [model.spec.prompt.caption, Target(answer_text(caption), ends=False), Control("".join(known_tokens(model)))]
    start = model.encode(first)
    said = [
        *model.lm.tokenize(SEPARATOR),
        *(i for i, label in zip(own.ids, own.labels, strict=True) if label != IGNORED),
    ]
    return Encoded([*start.ids, *said], [*start.visual, *([False] * len(said))], [*start.labels, *said])
