"""Count the word n-grams that BLEU and CIDEr compare."""

from __future__ import annotations

from collections import Counter
from itertools import chain

from mllm.eval.metrics.ptb import tokenize

Ngrams = Counter[tuple[str, ...]]


def words(caption: str) -> list[str]:
    """Return the caption's words; a token that contains a no-break space (1 1/2) is several, as in published scores."""
    tokens: str = tokenize(caption)
    return tokens.split()


def count_ngrams(words: list[str], longest: int) -> Ngrams:
    """Count the n-grams of 1 to ``longest`` words."""
    lengths = range(1, longest + 1)
    return Counter(chain.from_iterable(zip(*(words[i:] for i in range(n)), strict=False) for n in lengths))
