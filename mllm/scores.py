"""What a metric returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean


@dataclass(frozen=True)
class Score:
    """One metric's result: the corpus value, the value of each item in the order given, and what computed it."""

    value: float
    per_item: list[float]  # empty where only the whole has a value
    name: str  # the registry name, e.g. "caption/cider-d"
    version: str  # raised when the same input would score differently
    better: str = "higher"  # or "lower"
    alone: Callable[[Sequence[int]], float] | None = field(default=None, compare=False, repr=False)

    def of(self, items: Sequence[int]) -> float:
        """Return the value of some of the items alone, where an item may be named several times; not for all scores."""
        return self.alone(items) if self.alone else fmean(self.per_item[item] for item in items)
