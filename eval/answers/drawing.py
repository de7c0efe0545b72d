"""Answer by generated images (``answer: draw``): the image decoder draws what each item's text says."""

from __future__ import annotations

from collections.abc import Sequence

from mllm.eval.answers.base import Context
from mllm.eval.baselines import derangement
from mllm.eval.scoring import MODEL

from mllm.assembly import Assembly
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.media.images import ImageSource
from mllm.processes import progress
from mllm.prompts.pieces import answer_text


class Draw:
    """Generate an image for each item's text, saved as ``images/NUMBER.png`` in the report's folder."""

    def baselines(self, items: Sequence[Item]) -> dict[str, bool]:
        """Return ``shuffled``: the image that was generated for another item."""
        return {"shuffled": True}

    def answers(self, model: Assembly, items: Sequence[Item], context: Context) -> dict[str, list[str]]:
        """Return the paths of the generated images."""
        if context.folder is None:
            raise MLLMError("This suite generates images, and there is no folder to save them in: give out=FOLDER.")
        folder, size = context.folder / "images", context.suite.batch_size
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        with progress() as bar:
            task = bar.add_task(MODEL, total=None, note="")
            for start in bar.track(range(0, len(items), size), task_id=task):
                images = model.draw(caption_prompts(model, items[start : start + size]))
                for number, part in enumerate(images, start):
                    paths.append(str(folder / f"{number}.png"))
                    part.image.save(paths[-1])
        baselines = {name: [paths[other] for other in derangement(items)] for name in context.baselines}
        return {MODEL: paths, **baselines}

    def shown_images(self, item: Item, answer: str) -> tuple[ImageSource, ...]:
        """Return the item's real images, if there are any."""
        return item.images


def caption_prompts(model: Assembly, items: Sequence[Item]) -> list[list[str]]:
    """Return a prompt for each item: its question, or else its first caption, after the recipe's caption prompt."""
    return [[model.spec.prompt.caption + answer_text(item.question or item.answers[0])] for item in items]
