"""Reward answers by a metric of captions or answers: self-critical training (arXiv:1612.00563)."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from mllm.errors import MLLMError
from mllm.evaluation import metric
from mllm.guides.contracts import Samples


class MetricReward:
    """The value of a metric for each answer and the answer that its training example has.

    What a metric counts over a data set, such as CIDEr-D's document frequencies, it counts over a batch's samples.

    Args:
        name: of the metric, such as ``caption/cider-d``.

    Raises:
        MLLMError: no metric has that name, or it needs images or another model.
    """

    per_example = False

    def __init__(self, *, name: str) -> None:
        self.name, self._metric = name, metric(name)
        needed = sorted(inspect.signature(self._metric).parameters.keys() & {"images", "scorer", "judge"})
        if needed:
            raise MLLMError(
                f"The reward metric cannot be {name}, which needs {' and '.join(needed)}. Give another metric; "
                "closeness compares with the image."
            )

    def __call__(self, samples: Samples) -> Tensor:
        """Return the values ``(N,)``.

        Raises:
            MLLMError: the metric has a value for a whole data set only.
        """
        values = self._metric(list(samples.texts), [list(group) for group in samples.references]).per_item
        if len(values) != len(samples.texts):
            raise MLLMError(f"The reward metric cannot be {self.name}, which has no value of a single answer.")
        return torch.tensor(values)
