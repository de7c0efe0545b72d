"""Answer by generated text (``answer: generate``): captions, answers to questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mllm.eval.answers.asking import Asking, Group, Query, unanswerable
from mllm.eval.answers.base import Context
from mllm.eval.baselines import offered
from mllm.eval.nearest import NEAREST, nearest_answers

from mllm.answering.decode import for_encoded, make_decoding
from mllm.answering.view import Views
from mllm.assembly import Assembly
from mllm.config.parts import KINDS
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
            groups = [queries for _, queries in batch]
            replies: dict[tuple[int, str], str] = {}
            for kind in dict.fromkeys(query.kind for queries in groups for query in queries.values()):
                texts = [[text for text, query in queries.items() if query.kind == kind] for queries in groups]
                answers = views.continue_with(texts, **{"kind": kind, **context.suite.decoding})
                for number, (asked, answered) in enumerate(zip(texts, answers, strict=True)):
                    replies |= {(number, text): answer for text, answer in zip(asked, answered, strict=True)}
            return [replies[number, text] for number, queries in enumerate(groups) for text in queries]

        prompted = replace(context, baselines=[name for name in context.baselines if name != NEAREST])
        replies = Asking(prompted, _queries, generated, grouped=True).replies(model, items)
        answers = {name: [text for (text,) in rows] for name, rows in replies.items()}
        if NEAREST in context.baselines:
            answers[NEAREST] = nearest_answers(model, items, context.training)
        return answers

    def unanswerable(self, model: Assembly, items: Sequence[Item], context: Context) -> dict[int, str]:
        """Return the items whose prompt and answer do not fit into the language model's context."""
        decodings = {kind: make_decoding(model, {"kind": kind, **context.suite.decoding}) for kind in KINDS}

        def check(prompt: list[Piece], query: Query) -> None:
            encoded, decoding = model.encode(prompt), decodings[query.kind]
            if decoding.nearest_words is None:  # which makes another prompt
                for_encoded(model, encoded, decoding)

        return unanswerable(model, items, context, _queries, check, grouped=True)

    def shown_images(self, item: Item, answer: str) -> tuple[ImageSource, ...]:
        """Return the item's images."""
        return item.images


def _queries(item: Item, prompt: PromptSpec, examples: tuple[Piece, ...]) -> list[Query]:
    return [Query(item.images, question_text(item, prompt), before=examples, kind=item.answer_kind)]
