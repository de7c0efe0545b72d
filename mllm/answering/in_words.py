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
from mllm.lms.stop_words import is_stop_word
from mllm.lms.vocabulary import lexicon
from mllm.model import Model
from mllm.outputs import Output
from mllm.prompts.pieces import Piece, images_of, is_image

DEFAULTS: dict[str, Any] = {"top": 8, "orders": 1, "stop_words": True, "standardize": False}


def answer_in_words(model: Model, prompts: Sequence[Sequence[Piece]], decoding: Decoding) -> list[Output]:
    """Return the answer to each prompt, with words in place of its images.

    Args:
        model: the model.
        prompts: interleaved prompts.
        decoding: its ``nearest_words`` has ``top``, words per image, and ``orders``, in how many orders they are tried:
            the first has the closest word first, the others are random (the same each time). The other options are
            those of `nearest_words`.

    Raises:
        MLLMError: unknown options, or several orders without a scorer to select by.
    """
    options = decoding.nearest_words or {}
    if not all(_is_valid(name, value) for name, value in options.items()):
        raise MLLMError(
            f"decoding.nearest_words is {options!r}: expected whole numbers 'top' (8) and 'orders' (1), and true or "
            "false for 'stop_words' (true) and 'standardize' (false)."
        )
    how = {**DEFAULTS, **options}
    orders = how.pop("orders")
    images = [image for prompt in prompts for image in images_of(prompt)]
    words = iter(nearest_words(model, images, **how))
    groups = [_rows(prompt, words, orders if images_of(prompt) else 1) for prompt in prompts]
    rows = [row for group in groups for row in group]
    outputs = iter(answer(model, rows, [decoding] * len(rows)))
    answers = [[next(outputs) for _ in group] for group in groups]
    return [
        several[0] if len(several) == 1 else closest(model, prompt, several)
        for prompt, several in zip(prompts, answers, strict=True)
    ]


def _is_valid(name: str, value: Any) -> bool:
    """Whether an option has the type of its default, and a number is positive."""
    return name in DEFAULTS and type(value) is type(DEFAULTS[name]) and (isinstance(value, bool) or value > 0)


@torch.no_grad()
def nearest_words(
    model: Model, images: Sequence[Any], top: int, *, stop_words: bool = True, standardize: bool = False
) -> list[list[str]]:
    """Return for each image its ``top`` nearest words, the nearest first and none twice.

    The distance is the cosine with the mean of the image's visual tokens, both centred by the mean token embedding.

    Args:
        model: the model.
        images: the images.
        top: words per image.
        stop_words: whether English function words are among them.
        standardize: both are standardized by the mean and deviation of the whole table of embeddings, as SITTA's code.
    """
    if not images:
        return []
    vocabulary = [(token, text) for token, text in lexicon(model.lm) if stop_words or not is_stop_word(text)]
    table = model.lm.embed(torch.tensor([token for token, _ in vocabulary], device=model.device)).float()  # (W, D_lm)
    whole = model.lm.model.get_input_embeddings().weight.float()
    centre, spread = (whole.mean(0), whole.std(0, correction=0)) if standardize else (table.mean(0), 1.0)
    visual = model.overview(images).float().mean(1)  # (I, D_lm)
    words = normalize((table - centre) / spread, dim=-1)
    order = (normalize((visual - centre) / spread, dim=-1) @ words.T).argsort(1, descending=True)
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
