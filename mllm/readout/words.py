"""Read visual tokens as words: the nearest word of each, which shows what a connector found in an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch

from mllm.capabilities import SpeaksWords
from mllm.errors import MLLMError
from mllm.lms.words import NEUTRAL, Vocabulary
from mllm.model import Model

BATCH = 16


@torch.no_grad()
def visual_words(model: Model, images: Sequence[Any]) -> Iterator[list[str]]:
    """Yield for each image the nearest word of each of its Q visual tokens, with the space before it.

    The words are those of the connector's ``vocabulary``, or else the language model's whole words.

    Raises:
        MLLMError: the model has no connector, or no language model that generates text.
    """
    connector = model.connector
    if connector is None or not model.generates_text:
        raise MLLMError("Words of visual tokens need a connector and a language model that generates text.")
    vocabulary = connector.vocabulary if isinstance(connector, SpeaksWords) else Vocabulary(model.lm).to(model.device)
    for start in range(0, len(images), BATCH):
        tokens = model.overview(images[start : start + BATCH], before_words=True)
        for ids in vocabulary.nearest(tokens).tolist():
            yield [vocabulary.text(token) for token in ids]


def readable(words: Sequence[str]) -> str:
    """Return the words of an image as one text: without the neutral one, and each repeated word once."""
    return "".join(word for word, _ in groupby(words) if word.strip() != NEUTRAL).strip()
