"""Leave out the items of a suite that do not fit into the language model's context, with a baseline's image neither."""

from __future__ import annotations

from collections.abc import Sequence

from mllm.eval.answers.base import AnswerMode, ChecksItems, Context
from mllm.eval.baselines import OTHER_IMAGES, conditions

from mllm.assembly import Assembly
from mllm.data.items import Item
from mllm.errors import MLLMError


def that_fit(
    mode: AnswerMode, model: Assembly, items: Sequence[Item], context: Context
) -> tuple[Sequence[Item], dict[str, str]]:
    """Return the items that fit into the language model's context, and the others' ids with the errors.

    Raises:
        MLLMError: none fits.
    """
    errors = mode.unanswerable(model, items, context) if isinstance(mode, ChecksItems) else {}
    if errors and len(errors) == len(items):
        raise MLLMError(f"No item of the suite {context.suite.name} fits. Item {items[0].id!r}: {errors[0]}")
    kept = [item for index, item in enumerate(items) if index not in errors]
    return kept, {items[index].id: error for index, error in errors.items()}


def that_fit_with_others(
    mode: AnswerMode, model: Assembly, items: Sequence[Item], context: Context
) -> tuple[Sequence[Item], dict[str, str]]:
    """Return the items that also fit with the images of the baselines, and the others' ids with the errors.

    It matters where an image takes tokens by its size. Which image is another's changes with the items that are left.

    Raises:
        MLLMError: none fits, or the items have too few images for a baseline.
    """
    names = [name for name in context.baselines if name in OTHER_IMAGES]
    skipped: dict[str, str] = {}
    if isinstance(model.counts, int) or not isinstance(mode, ChecksItems):
        return items, skipped
    while True:
        others = {name: condition.items for name, condition in conditions(model, items, names).items()}
        errors = {
            items[index].id: f"With the image of the baseline {name}: {error}"
            for name in names
            for index, error in mode.unanswerable(model, others[name], context).items()
        }
        skipped |= errors
        items = [item for item in items if item.id not in errors]
        if not items:
            raise MLLMError(f"No item fits. {next(iter(skipped.values()))}")
        if not errors:
            return items, skipped
