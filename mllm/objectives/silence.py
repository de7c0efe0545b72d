"""When no image is to be shown: its tokens stay unlikely within captions, and in the language model's own texts.

Behind a caption that stands alone an image's first token learns to be said (`mllm.objectives.retrieval`). Nothing in
that keeps it from being said elsewhere, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mllm.capabilities import ImageTokenHead
from mllm.errors import MLLMError
from mllm.lms.decoding import Decoding
from mllm.prompts.batch import IGNORED, Batch, Encoded, collate
from mllm.prompts.pieces import Control, Piece, Target, answer_text
from mllm.readout.states import captions
from mllm.readout.tokens import image_tokens
from mllm.slots import Inputs, LanguageModel


class Silence:
    """The negative log-likelihood of texts where no image is: a caption's words, what follows its image, its own texts.

    The model's own texts are what its language model says without what is learnt, so no data is needed: at the start
    of a sequence, sampled when the first batch comes; and behind a caption and its image, the likeliest at each step,
    since tokens that were just said are easily said again. While nothing in the language model trains, all that this
    can teach is not to say the new tokens.

    Args:
        texts: that are sampled at the start of a sequence.
        length: of each, in tokens, at most; behind an image a third of it.
        together: of the batch's captions, and of these texts, that a step looks at, drawn each time.
    """

    needs = (LanguageModel, ImageTokenHead)
    per_example = False

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
        if model.spec.trains("lm"):
            raise MLLMError(
                "silence keeps to what the language model says by itself, and here it trains. Leave it out."
            )
        if not self._own:
            self._own = own_texts(model, [_start(model)] * self._texts, self._length, range(self._texts))
        shown, own = [_shown(model, text) for text in self._drawn(found)], self._drawn(self._own)
        rows = [*own_texts(model, shown, max(self._length // 3, 1)), *own]
        batch = collate(rows, model.lm.pad).to(model.device)
        embeds = model.lm.embed(batch.ids).detach()  # what a token does to the states behind it is not at stake
        losses: Tensor = model.lm.losses(embeds, batch.mask, batch.labels)
        return losses.mean() * len(found)

    def _drawn(self, texts: Sequence[Any]) -> list[Any]:
        """Return some of the texts, by torch's own generator: a resumed run goes on with it."""
        return [texts[place] for place in torch.randperm(len(texts))[: self._together]]


@torch.no_grad()
def own_texts(model: Any, starts: Sequence[Encoded], length: int, seeds: Sequence[int] = ()) -> list[Encoded]:
    """Return what a model's language model says by itself behind each start, as targets.

    It is sampled by seeds, or else the likeliest, of so many tokens at most. What stands inside the language model, and
    new tokens, are left out.
    """
    batch = collate(starts, model.lm.pad).to(model.device)
    sampled = [Decoding(max_new_tokens=length, warpers={"temperature": 1.0}, seed=seed) for seed in seeds]
    decodings = sampled or [Decoding(max_new_tokens=length)] * len(starts)
    with model.adapters_off():
        found = model.lm.generate(batch.mask, decodings, input_ids=batch.ids)
    return [
        Encoded([*start.ids, *said], [*start.visual, *([False] * len(said))], [*start.labels, *said])
        for start, said in zip(starts, found, strict=True)
    ]


def _start(model: Any) -> Encoded:
    """Return what a sequence starts with: the tokenizer's own first token, or else an end."""
    ids = list(model.lm.bos) or [model.lm.eos]
    return Encoded(ids, [False] * len(ids), [IGNORED] * len(ids))


def _shown(model: Any, caption: str) -> Encoded:
    """Return a caption, its words as targets, with its image's tokens behind it."""
    tokens, target = Control("".join(image_tokens(model))), Target(answer_text(caption), ends=False)
    encoded: Encoded = model.encode([model.spec.prompt.caption, target, tokens])
    return encoded
