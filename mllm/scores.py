"""What a metric returns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """One metric's result: the corpus value, the value of each item in the order given, and what computed it."""

    value: float
    per_item: list[float]
    name: str  # the registry name, e.g. "caption/cider-d"
    version: str  # raised when the same input would score differently
