"""Score answers to yes-or-no questions (POPE: is there a ... in the image?), with "yes" as the positive class.

Li et al. 2023, https://arxiv.org/abs/2305.10355. As there, an answer is "no" if its first sentence has the word "no" or
"not", else "yes". A model that always answers yes has a yes-rate of 1 and a recall of 1.
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
    predicted, true = _read(predictions, references)
    right = predicted == true
    return Score(float(right.mean()), right.astype(float).tolist(), "pope/accuracy", VERSION)


def yes_rate(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return the share of the answers that are yes; 1/2 is expected if half of the objects are in the images."""
    predicted, _ = _read(predictions, references)
    return Score(float(predicted.mean()), predicted.astype(float).tolist(), "pope/yes-rate", VERSION)


def f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return F1 of "yes"; 0 if precision and recall are 0."""
    predicted, true = _read(predictions, references)

    def alone(chosen: Sequence[int]) -> float:
        both = int((predicted[chosen] & true[chosen]).sum())
        return 2 * both / total if (total := int(predicted[chosen].sum() + true[chosen].sum())) else 0.0

    value = alone(range(len(predicted)))
    return Score(value, (predicted == true).astype(float).tolist(), "pope/f1", VERSION, alone=alone)


def _read(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Return which answers are yes, and which should be: ``(N,)`` of bool each."""
    check(predictions, references)
    for item, answers in enumerate(references):
        if {answer.strip().lower() for answer in answers} not in ({"yes"}, {"no"}):
            raise MLLMError(f"The reference of item {item} is {list(answers)!r}: expected yes or no.")
    predicted = [not {"no", "not"} & set(re.findall(r"\w+", text.lower().split(".")[0])) for text in predictions]
    true = [answers[0].strip().lower() == "yes" for answers in references]
    return np.array(predicted), np.array(true)
