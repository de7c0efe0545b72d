"""Read visual tokens as words: the nearest word of each, which shows what a connector found in an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch

from mllm.capabilities import RemembersTexts, SpeaksWords
from mllm.errors import MLLMError
from mllm.lms.words import NEUTRAL, Vocabulary
from mllm.model import Model

BATCH = 16


@torch.no_grad()
def visual_words(model: Model, images: Sequence[Any]) -> Iterator[list[str]]:
    """Yield for each image the nearest word of each of its visual tokens, with the space before it.

    The words are those of the connector's ``vocabulary``, or else the language model's whole words; those of a memory's
    texts are any tokens.

    Raises:
        MLLMError: the model has no connector, or no language model that generates text.
    """
    connector = model.connector
    if connector is None or not model.generates_text:
        raise MLLMError("Words of visual tokens need a connector and a language model that generates text.")
    if isinstance(connector, SpeaksWords):
        vocabulary = connector.vocabulary
    else:
        words = "all" if isinstance(connector, RemembersTexts) else "language"
        vocabulary = Vocabulary(model.lm, words=words).to(model.device)
    for start in range(0, len(images), BATCH):
        opened = [model.encoder.open(image) for image in images[start : start + BATCH]]
        layouts = model.layouts(opened)
        features = model.encoded([tile for image in opened for tile in model.encoder.tiles(image)])
        tokens = model.in_order(connector.before_words(model.arranged(features, layouts)), layouts)
        counts = [connector.num_tokens] * len(opened) if layouts is None else list(map(connector.tokens_of, layouts))
        for ids in vocabulary.nearest(tokens).flatten().split(counts):
            yield [vocabulary.text(token) for token in ids.tolist()]


def readable(words: Sequence[str]) -> str:
    """Return the words of an image as one text: without the neutral one, and each repeated word once."""
    return "".join(word for word, _ in groupby(words) if word.strip() != NEUTRAL).strip()
