"""Compute CIDEr and CIDEr-D of captions: agreement with the references, with higher weights for rare n-grams.

Vedantam et al. 2015, https://arxiv.org/abs/1411.5726. An n-gram of a caption weighs its count times its inverse
document frequency, ``log(N / number of items whose references have it)`` over the N items given. So values of different
sets (or of a subset) cannot be compared, and a single item always scores 0. Captions are PTB-tokenised; values are
multiplied by 10, as in the released code. What papers report as "CIDEr" is CIDEr-D.

All captions are weighted at once: the rows of one table, sorted, are the distinct n-grams of every caption.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from mllm.eval.metrics.checks import check
from mllm.eval.metrics.ngrams import words

from mllm.evaluation import Score

VERSION = "1"

_LONGEST = 4  # words in an n-gram
_SIGMA = 6.0  # of the length penalty, in words

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def cider_d(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return CIDEr-D, guarded against gaming: weights are clipped to the reference's, length differences penalised."""
    return _score(predictions, references, guarded=True)


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return CIDEr by the paper's equations 1 to 3: the cosine of the weights, averaged over n = 1 to 4."""
    return _score(predictions, references, guarded=False)


class _Table(NamedTuple):
    """The distinct n-grams of every caption, for one n, ordered by caption and n-gram. The predictions come first."""

    caption: Ints  # (rows,)
    ngram: Ints  # (rows,)
    counts: Ints  # (rows,): of the n-gram in the caption


def _score(predictions: Sequence[str], references: Sequence[Sequence[str]], guarded: bool) -> Score:
    check(predictions, references)

    def alone(chosen: Sequence[int]) -> float:
        return _score([predictions[i] for i in chosen], [references[i] for i in chosen], guarded).value

    num_references = np.array([len(answers) for answers in references])
    item = np.repeat(np.arange(len(references)), num_references)  # (references,): the item of each
    captions = [words(caption) for caption in predictions]
    captions += [words(caption) for answers in references for caption in answers]
    similarity = sum((_cosines(table, item, guarded) for table in _tables(captions)), start=np.zeros(len(item)))
    if guarded:
        # The released code measures length in bigrams.
        num_bigrams = np.array([max(0, len(caption) - 1) for caption in captions])
        difference = num_bigrams[item] - num_bigrams[len(references) :]
        similarity *= np.exp(-(difference**2) / (2 * _SIGMA**2))
    per_item = 10 / _LONGEST * np.bincount(item, similarity) / num_references
    name = "caption/cider-d" if guarded else "caption/cider"
    return Score(float(per_item.mean()), per_item.tolist(), name, VERSION, alone=alone)


def _tables(captions: Sequence[list[str]]) -> Iterator[_Table]:
    """Count the n-grams of all captions, for n = 1 to 4."""
    vocabulary: dict[str, int] = {}
    ids = np.array([vocabulary.setdefault(word, len(vocabulary)) for caption in captions for word in caption], np.int64)
    owner = np.repeat(np.arange(len(captions)), [len(caption) for caption in captions])
    owner = np.append(owner, np.full(_LONGEST, -1))  # no n-gram reaches past the last caption
    start, ngram = np.arange(len(ids)), ids
    for n in range(1, _LONGEST + 1):
        if n > 1:
            inside = owner[start] == owner[start + n - 1]
            start = start[inside]
            longer = ngram[inside] * len(vocabulary) + ids[start + n - 1]
            ngram = np.unique(longer, return_inverse=True)[1]
        size = ngram.max(initial=0) + 1
        key, counts = np.unique(owner[start] * size + ngram, return_counts=True)
        yield _Table(key // size, key % size, counts)


def _cosines(table: _Table, item: Ints, clip: bool) -> Floats:
    """Return each reference's cosine with its prediction; ``clip``: weights are clipped to the reference's."""
    num_items = item[-1] + 1
    size = table.ngram.max(initial=0) + 1
    first = np.searchsorted(table.caption, num_items)  # the references' first row
    row_item = np.append(table.caption[:first], item[table.caption[first:] - num_items])
    key = row_item * size + table.ngram
    item_ngram = np.sort(key[first:])
    item_ngram = item_ngram[np.diff(item_ngram, prepend=-1) > 0]  # numpy's unique hashes here, which is far slower
    frequency = np.bincount(item_ngram % size, minlength=size)
    weight = table.counts * np.log(num_items / np.maximum(frequency, 1))[table.ngram]
    norm = np.sqrt(np.bincount(table.caption, weight**2, minlength=num_items + len(item)))

    predicted, answer = weight[:first], weight[first:]
    row = np.searchsorted(key[:first], key[first:])  # of the same n-gram in the prediction, if it has it
    same = np.append(key[:first], -1)[row] == key[first:]
    predicted = np.append(predicted, 0.0)[row] * same
    product = (np.minimum(predicted, answer) if clip else predicted) * answer
    total = np.bincount(table.caption[first:] - num_items, product, minlength=len(item))
    scale = norm[item] * norm[num_items:]
    cosines: Floats = np.divide(total, scale, out=np.zeros(len(item)), where=scale > 0)
    return cosines
