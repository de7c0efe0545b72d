"""Find the scorer that a model is by itself: images and sentences in one space, a retrieval head, or matching."""

from __future__ import annotations

from typing import Any

from mllm.errors import MLLMError
from mllm.model import Model
from mllm.registry import lookup


def own_scorer(model: Model) -> Any:
    """Return the model as its own scorer.

    Raises:
        MLLMError: it has no parts that compare images with texts.
    """
    if hasattr(model.lm, "sentences"):
        return lookup("scorers", "aligned")(model=model)
    if "retrieval" in model.heads:
        return lookup("scorers", "retrieval")(model=model)
    if {"contrast", "match"} <= set(model.heads):
        return lookup("scorers", "matching")(model=model)
    raise MLLMError(
        "This needs a scorer: set scorer={'type': 'dual-encoder', 'model': ...} (CLIP, ...), "
        "{'type': 'aligned', 'model': RUN} with a run of emoji-scorer, or {'type': 'retrieval', 'model': RUN} "
        "with one of a retrieval head (of contrast and matching: 'matching')."
    )
