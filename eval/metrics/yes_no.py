"""Score answers to questions of yes or no (POPE: is there a ... in the image?), "yes" being what is looked for.

Li et al. 2023, https://arxiv.org/abs/2305.10355. As there, an answer is "no" if it holds the word "no" or "not", else
"yes": the first sentence counts alone. A model that always says yes has a yes-rate of 1 and a recall of 1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from mllm.eval.metrics.checks import check

from mllm.errors import MLLMError
from mllm.evaluation import Score

VERSION = "1"


def accuracy(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return the share of right answers."""
    said, true = _read(predictions, references)
    right = said == true
    return Score(float(right.mean()), right.astype(float).tolist(), "pope/accuracy", VERSION)


def yes_rate(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return the share of the answers that are yes; half is expected where half of the things are there."""
    said, _ = _read(predictions, references)
    return Score(float(said.mean()), said.astype(float).tolist(), "pope/yes-rate", VERSION)


def f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return the harmonic mean of precision and recall of "yes"; 0 where neither is."""
    said, true = _read(predictions, references)

    def alone(chosen: Sequence[int]) -> float:
        both = int((said[chosen] & true[chosen]).sum())
        return 2 * both / total if (total := int(said[chosen].sum() + true[chosen].sum())) else 0.0

    value = alone(range(len(said)))
    return Score(value, (said == true).astype(float).tolist(), "pope/f1", VERSION, alone=alone)


def _read(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Return which answers are yes, and which should be: (N,) of bool each."""
    check(predictions, references)
    for item, answers in enumerate(references):
        if {answer.strip().lower() for answer in answers} not in ({"yes"}, {"no"}):
            raise MLLMError(f"The reference of item {item} is {list(answers)!r}: expected yes or no.")
    said = [not {"no", "not"} & set(re.findall(r"\w+", text.lower().split(".")[0])) for text in predictions]
    true = [answers[0].strip().lower() == "yes" for answers in references]
    return np.array(said), np.array(true)
