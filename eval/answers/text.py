"""Answer by generated text (``answer: generate``): captions, answers to questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from mllm.eval.answers.asking import Asking, Group, Query, unanswerable
from mllm.eval.answers.base import Context
from mllm.eval.baselines import offered
from mllm.eval.nearest import NEAREST, nearest_answers

from mllm.answering.decode import for_encoded, make_decoding
from mllm.answering.view import Views
from mllm.assembly import Assembly
from mllm.config.prompt import PromptSpec
from mllm.data.items import Item, question_text
from mllm.media.images import ImageSource
from mllm.prompts.pieces import Piece


class Generate:
    """Generate a text for each item, with the suite's ``decoding``; questions on one image share its encoding."""

    def baselines(self, items: Sequence[Item]) -> dict[str, bool]:
        """Return the baselines of prompted models and, for items with images, ``nearest``."""
        return {**offered(), NEAREST: True} if any(item.images for item in items) else offered()

    def answers(self, model: Assembly, items: Sequence[Item], context: Context) -> dict[str, list[str]]:
        """Return the generated texts."""

        def generated(views: Views, batch: Sequence[Group]) -> list[str]:
            return list(chain(*views.continue_with([list(texts) for _, texts in batch], **context.suite.decoding)))

        prompted = replace(context, baselines=[name for name in context.baselines if name != NEAREST])
        replies = Asking(prompted, _queries, generated, grouped=True).replies(model, items)
        answers = {name: [text for (text,) in rows] for name, rows in replies.items()}
        if NEAREST in context.baselines:
            answers[NEAREST] = nearest_answers(model, items, context.training)
        return answers

    def unanswerable(self, model: Assembly, items: Sequence[Item], context: Context) -> dict[int, str]:
        """Return the items whose prompt and answer do not fit into the language model's context."""
        decoding = make_decoding(model, context.suite.decoding)

        def check(prompt: list[Piece], query: Query) -> None:
            encoded = model.encode(prompt)
            if decoding.nearest_words is None:  # which makes another prompt
                for_encoded(model, encoded, decoding)

        return unanswerable(model, items, context, _queries, check, grouped=True)

    def shown_images(self, item: Item, answer: str) -> tuple[ImageSource, ...]:
        """Return the item's images."""
        return item.images


def _queries(item: Item, prompt: PromptSpec, examples: tuple[Piece, ...]) -> list[Query]:
    return [Query(item.images, question_text(item, prompt), before=examples)]
