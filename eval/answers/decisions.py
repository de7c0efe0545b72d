"""Answer by the decision head's label (``answer: decide``): whether an image is to be retrieved or generated."""

from __future__ import annotations

from collections.abc import Sequence

from mllm.eval.answers.base import Context
from mllm.eval.answers.drawing import caption_prompts
from mllm.eval.scoring import MODEL

from mllm.assembly import Assembly
from mllm.capabilities import DECISIONS, DecisionHead
from mllm.data.items import Item
from mllm.media.images import ImageSource
from mllm.processes import progress
from mllm.readout.decision import decide, states_at


class Decide:
    """Decide for each item's text between ``retrieve`` and ``generate``."""

    def baselines(self, items: Sequence[Item]) -> dict[str, bool]:
        """Return the labels: a baseline gives the same label to every item."""
        return dict.fromkeys(DECISIONS, True)

    def answers(self, model: Assembly, items: Sequence[Item], context: Context) -> dict[str, list[str]]:
        """Return the labels."""
        model.find(DecisionHead)
        labels: list[str] = []
        size = context.suite.batch_size
        with progress() as bar:
            task = bar.add_task(MODEL, total=None, note="")
            for start in bar.track(range(0, len(items), size), task_id=task):
                prompts = caption_prompts(model, items[start : start + size])
                labels += decide(model, states_at(model, prompts, None))
        return {MODEL: labels, **{label: [label] * len(items) for label in context.baselines}}

    def shown_images(self, item: Item, answer: str) -> tuple[ImageSource, ...]:
        """Return the item's images."""
        return item.images
