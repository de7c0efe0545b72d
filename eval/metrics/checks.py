"""Check the arguments of a metric."""

from __future__ import annotations

from collections.abc import Sequence

from mllm.errors import MLLMError


def check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Check that there is one prediction, a string, and at least one reference string for each item.

    Raises:
        MLLMError: no items, lengths that differ, a prediction or reference that is not a string, an item without
            references; the message names the item (counted from 0).
    """
    if len(predictions) != len(references):
        raise MLLMError(
            f"{len(predictions)} predictions for {len(references)} lists of references: expected one prediction for "
            "each, in the same order. Score the same items on both sides."
        )
    if not len(predictions):
        raise MLLMError("There is nothing to score: 0 predictions, expected at least 1. Check the data and the limit.")
    for item, (prediction, answers) in enumerate(zip(predictions, references, strict=True)):
        if not isinstance(prediction, str):
            raise MLLMError(f"The prediction of item {item} is {_described(prediction)}: expected a string. {_ADVICE}")
        if isinstance(answers, str):
            raise MLLMError(
                f"The references of item {item} are one string, {answers!r}: expected a list of strings. "
                "Put it in a list."
            )
        if not len(answers):
            raise MLLMError(f"Item {item} has no reference: expected at least one. Leave the item out, or add one.")
        for answer in answers:
            if not isinstance(answer, str):
                raise MLLMError(f"A reference of item {item} is {_described(answer)}: expected a string. {_ADVICE}")


_ADVICE = 'Pass "" for an answer that is missing.'


def _described(value: object) -> str:
    return f"{value!r} ({type(value).__name__})"
