"""Count the optimizer steps of a stage's ``epochs``, its passes over the data.

An epoch ends when every source has been read once. Several sources are sampled by their weights, so this holds on
average, and the source that takes longest decides: the others have begun again by then. A batch is that of all
processes. The number of steps is rounded up, so the last batch is full and holds examples of the next epoch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from mllm.config.recipe import Stage
from mllm.data.sources import Source


def examples_of_epoch(sources: Sequence[Source]) -> Fraction:
    """Return how many examples are drawn until every source has been read once, on average."""
    weights = [_exact(source.spec.weight) for source in sources]
    return max(len(source.items) * sum(weights) / own for source, own in zip(sources, weights, strict=True))


def steps_of(stage: Stage, sources: Sequence[Source]) -> int | None:
    """Return the optimizer steps of a stage on its training sources; None where it has neither steps nor epochs."""
    if stage.epochs is None:
        return stage.steps
    return math.ceil(_exact(stage.epochs) * examples_of_epoch(sources) / (stage.batch_size * stage.optim.accumulate))


def with_steps(stage: Stage, sources: Sequence[Source]) -> Stage:
    """Return a stage whose ``steps`` are set, also where its recipe gives ``epochs``."""
    return stage.model_copy(update={"steps": steps_of(stage, sources)})


def _exact(number: float) -> Fraction:
    """Return a number as it is written: 0.1 is a tenth."""
    return Fraction(str(number))
