"""Pictures told in words: the tokens whose embeddings are closest to a picture's visual tokens stand in its place.

As in SITTA (arXiv:2307.05591): the language model reads text alone, and several orders of the words give several
answers, of which a scorer keeps the one that is closest to the picture.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import normalize

from mllm.answering.decode import answer, decodings
from mllm.answering.rerank import closest
from mllm.errors import MLLMError
from mllm.lms.vocabulary import lexicon
from mllm.prompts.pieces import Control, Piece, Target, images_of

SETTINGS = {"top": 8, "orders": 1}


def told(model: Any, prompts: Sequence[Sequence[Piece]], wanted: dict[str, Any], decoding: dict[str, Any]) -> list[Any]:
    """Return each prompt's `Output`, its pictures told in words.

    Args:
        model: the assembly.
        prompts: interleaved prompts.
        wanted: ``top``, words of a picture; ``orders``, in how many orders they are put: the first one with the closest
            word first, the others drawn (the same each time).
        decoding: settings.

    Raises:
        MLLMError: unknown settings, or several orders without a scorer to choose by.
    """
    if not set(wanted) <= set(SETTINGS) or not all(isinstance(n, int) and n > 0 for n in wanted.values()):
        raise MLLMError(f"decoding.words is {wanted!r}: expected whole numbers 'top' (8) and 'orders' (1).")
    top, orders = ({**SETTINGS, **wanted}[name] for name in SETTINGS)
    words = iter(nearest(model, [image for prompt in prompts for image in images_of(prompt)], top))
    groups = [_rows(prompt, words, orders if images_of(prompt) else 1) for prompt in prompts]
    rows = [row for group in groups for row in group]
    answers = iter(answer(model, rows, decodings(model, rows, decoding)))
    found = [[next(answers) for _ in group] for group in groups]
    return [
        own[0] if len(own) == 1 else closest(model, prompt, own) for prompt, own in zip(prompts, found, strict=True)
    ]


@torch.no_grad()
def nearest(model: Any, images: Sequence[Any], top: int) -> list[list[str]]:
    """Return for each image the ``top`` words closest to it, the closest first; no word twice.

    Close is what has a high cosine with the mean of the image's visual tokens, both taken from the mean embedding.
    """
    if not images:
        return []
    vocabulary = lexicon(model.lm)
    table = model.lm.embed(torch.tensor([token for token, _ in vocabulary], device=model.device)).float()  # (W, D_lm)
    centre = table.mean(0)
    seen = model.connector(model.features(images)).float().mean(1)  # (I, D_lm)
    order = (normalize(seen - centre, dim=-1) @ normalize(table - centre, dim=-1).T).argsort(1, descending=True)
    return [_first(dict.fromkeys(vocabulary[place][1] for place in row), top) for row in order[:, : 20 * top].tolist()]


def _first(words: dict[str, None], top: int) -> list[str]:
    return list(words)[:top]


def _rows(prompt: Sequence[Piece], words: Any, orders: int) -> list[list[Piece]]:
    """Return a prompt with words in its pictures' places, once for every order."""
    own = [next(words) for _ in images_of(prompt)]
    return [_in_words(prompt, [_ordered(each, number) for each in own]) for number in range(orders)]


def _ordered(words: Sequence[str], number: int) -> list[str]:
    """Return words in their own order, or in the one of a number."""
    return list(words) if number == 0 else random.Random(number).sample(list(words), len(words))


def _in_words(prompt: Sequence[Piece], words: Sequence[Sequence[str]]) -> list[Piece]:
    left = iter(words)
    return [piece if isinstance(piece, str | Target | Control) else f" {', '.join(next(left))}." for piece in prompt]
