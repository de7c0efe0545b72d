"""Replace visual tokens by their nearest vocabulary tokens, so that the language model reads text alone.

As in SITTA (arXiv:2307.05591): several orders of the words give several answers, of which a scorer selects the one that
is closest to the image.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.nn.functional import normalize

from mllm.answering.decode import answer
from mllm.answering.rerank import closest
from mllm.errors import MLLMError
from mllm.lms.decoding import Decoding
from mllm.lms.vocabulary import lexicon
from mllm.model import Model
from mllm.outputs import Output
from mllm.prompts.pieces import Piece, images_of, is_image

DEFAULTS = {"top": 8, "orders": 1}


def answer_in_words(model: Model, prompts: Sequence[Sequence[Piece]], decoding: Decoding) -> list[Output]:
    """Return the answer to each prompt, with words in place of its images.

    Args:
        model: the model.
        prompts: interleaved prompts.
        decoding: its ``nearest_words`` has ``top``, words per image, and ``orders``, in how many orders they are tried:
            the first has the closest word first, the others are random (the same each time).

    Raises:
        MLLMError: unknown options, or several orders without a scorer to select by.
    """
    options = decoding.nearest_words or {}
    if not set(options) <= set(DEFAULTS) or not all(isinstance(n, int) and n > 0 for n in options.values()):
        raise MLLMError(f"decoding.nearest_words is {options!r}: expected whole numbers 'top' (8) and 'orders' (1).")
    top, orders = ({**DEFAULTS, **options}[name] for name in DEFAULTS)
    words = iter(nearest_words(model, [image for prompt in prompts for image in images_of(prompt)], top))
    groups = [_rows(prompt, words, orders if images_of(prompt) else 1) for prompt in prompts]
    rows = [row for group in groups for row in group]
    outputs = iter(answer(model, rows, [decoding] * len(rows)))
    answers = [[next(outputs) for _ in group] for group in groups]
    return [
        several[0] if len(several) == 1 else closest(model, prompt, several)
        for prompt, several in zip(prompts, answers, strict=True)
    ]


@torch.no_grad()
def nearest_words(model: Model, images: Sequence[Any], top: int) -> list[list[str]]:
    """Return for each image its ``top`` nearest words, the nearest first and none twice.

    The distance is the cosine with the mean of the image's visual tokens, both centred by the mean token embedding.
    """
    if not images:
        return []
    vocabulary = lexicon(model.lm)
    table = model.lm.embed(torch.tensor([token for token, _ in vocabulary], device=model.device)).float()  # (W, D_lm)
    centre = table.mean(0)
    visual = model.overview(images).float().mean(1)  # (I, D_lm)
    order = (normalize(visual - centre, dim=-1) @ normalize(table - centre, dim=-1).T).argsort(1, descending=True)
    return [
        list(islice(dict.fromkeys(vocabulary[index][1] for index in row), top)) for row in order[:, : 20 * top].tolist()
    ]


def _rows(prompt: Sequence[Piece], words: Iterator[list[str]], orders: int) -> list[list[Piece]]:
    """Return a prompt with words in place of its images, once for every order."""
    by_image = [next(words) for _ in images_of(prompt)]
    return [_in_words(prompt, [_ordered(each, number) for each in by_image]) for number in range(orders)]


def _ordered(words: Sequence[str], number: int) -> list[str]:
    """Return words as they are, or in the random order of a number above 0."""
    return list(words) if number == 0 else random.Random(number).sample(list(words), len(words))


def _in_words(prompt: Sequence[Piece], words: Sequence[Sequence[str]]) -> list[Piece]:
    left = iter(words)
    return [f" {', '.join(next(left))}." if is_image(piece) else piece for piece in prompt]
