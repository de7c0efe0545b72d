"""Suppress an image's tokens where no image belongs: within captions, and in text the language model generates itself.

The objective `token-prediction` (`mllm.objectives.retrieval`) teaches the model to generate an image's first token
after a caption, and nothing in it keeps the token from being generated elsewhere, too. This is its counterpart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from mllm.capabilities import ImageTokenHead
from mllm.devices import has_values
from mllm.errors import MLLMError
from mllm.lms.decoding import Decoding
from mllm.model import Model
from mllm.prompts.batch import IGNORED, Batch, Encoded, collate
from mllm.prompts.pieces import Control, Piece, Target, answer_text
from mllm.readout.states import captions
from mllm.readout.tokens import image_tokens
from mllm.registry import Count
from mllm.slots import Inputs, LanguageModel

T = TypeVar("T")


class TokenSuppression:
    """The negative log-likelihood of text without images: captions, their continuations, and generated texts.

    The generated texts come from the bare language model (adapters and new tokens off), so they need no data. Those at
    the start of a sequence are sampled at the first batch; those after a caption and its image tokens are decoded
    greedily in every step, since a token that was just generated is likely to be generated again. While nothing in the
    language model trains, all that this objective can teach is not to generate the new tokens.

    Args:
        texts: number of texts that are sampled at the start of a sequence.
        length: maximum tokens of each; after an image's tokens, a third of it.
        together: how many of the batch's captions, and of the sampled texts, a step draws at random.

    Raises:
        MLLMError: one of them is below 1.
    """

    needs = (LanguageModel, ImageTokenHead)
    per_example = False

    def __init__(self, *, texts: Count = 32, length: Count = 24, together: Count = 4) -> None:
        if min(texts, length, together) < 1:
            raise MLLMError(
                f"token-suppression: texts {texts}, length {length}, together {together}: expected 1 or more of each. "
                "Raise the one below 1."
            )
        self._num_texts, self._length, self._together = texts, length, together
        self._sampled: list[Encoded] = []

    def count(self, rows: Sequence[Sequence[Piece]], batch: Batch | None) -> int:
        """Return the number of captions."""
        return len(captions(rows))

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the mean over the texts' tokens, times the number of captions."""
        model, caption_texts = inputs.model, [text for _, text in captions(inputs.rows)]
        if not caption_texts:
            raise MLLMError("No example of a batch has a caption, within which no image is to be shown.")
        if model.spec.trains("lm"):
            raise MLLMError(
                "token-suppression trains on text that the frozen language model generates, and in this stage the "
                "language model trains. Remove the objective from the stage."
            )
        if not self._sampled:
            starts = [_sequence_start(model)] * self._num_texts
            self._sampled = generated_texts(model, starts, self._length, range(self._num_texts))
        with_image = [_with_image_tokens(model, text) for text in self._subset(caption_texts)]
        sampled = self._subset(self._sampled)
        rows = [*generated_texts(model, with_image, max(self._length // 3, 1)), *sampled]
        batch = collate(rows, model.lm.pad).to(model.device)
        embeds = model.lm.embed(batch.ids).detach()  # no gradient through the states that follow a token
        losses: Tensor = model.lm.losses(embeds, batch.mask, batch.labels)
        return losses.mean() * len(caption_texts)

    def _subset(self, texts: Sequence[T]) -> list[T]:
        """Return some of the texts at random, by torch's global generator, whose state a resumed run restores."""
        return [texts[index] for index in torch.randperm(len(texts))[: self._together]]


@torch.no_grad()
def generated_texts(model: Model, starts: Sequence[Encoded], length: int, seeds: Sequence[int] = ()) -> list[Encoded]:
    """Return each start with the continuation that the bare language model generates, as targets.

    Adapters and new tokens are off.

    Args:
        model: whose language model generates.
        starts: the encoded beginnings.
        length: maximum new tokens.
        seeds: one for each start, to sample with; none: greedy decoding.
    """
    if not has_values(model.lm.model.get_input_embeddings().weight):  # in a plan: texts of the full length
        return [_continued(start, [model.lm.eos] * length) for start in starts]
    batch = collate(starts, model.lm.pad).to(model.device)
    sampled = [Decoding(max_new_tokens=length, warpers={"temperature": 1.0}, seed=seed) for seed in seeds]
    decodings = sampled or [Decoding(max_new_tokens=length)] * len(starts)
    with model.adapters_off():
        continuations = model.lm.generate(batch.mask, decodings, input_ids=batch.ids)
    return [_continued(start, ids) for start, ids in zip(starts, continuations, strict=True)]


def _continued(start: Encoded, ids: Sequence[int]) -> Encoded:
    return Encoded([*start.ids, *ids], [*start.visual, *([False] * len(ids))], [*start.labels, *ids])


def _sequence_start(model: Model) -> Encoded:
    """Return the tokens that start a sequence: the tokenizer's BOS, or else the EOS."""
    ids = list(model.lm.bos) or [model.lm.eos]
    return Encoded(ids, [False] * len(ids), [IGNORED] * len(ids))


def _with_image_tokens(model: Model, caption: str) -> Encoded:
    """Return a caption, its text as target, followed by its image's tokens."""
    tokens, target = Control("".join(image_tokens(model))), Target(answer_text(caption), ends=False)
    return model.encode([model.spec.prompt.caption, target, tokens])
