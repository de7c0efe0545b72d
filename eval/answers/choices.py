"""Answer by the log-likelihoods of an item's choices: the most likely one, their order, or images and texts matched."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from mllm.eval.answers.asking import Asking, Group, Queries, Query, unanswerable
from mllm.eval.answers.base import Context
from mllm.eval.baselines import offered

from mllm.answering.decode import check_candidates, check_scoring
from mllm.answering.view import Views
from mllm.assembly import Assembly
from mllm.config.prompt import PromptSpec
from mllm.data.items import Item, question_text
from mllm.errors import MLLMError
from mllm.media.images import ImageSource
from mllm.prompts.pieces import Piece

TESTS = ("text", "image", "group")  # what two images and two captions that are matched can pass

Scores = Mapping[str, float]  # each choice's log-likelihood, or another score


def _query(item: Item, prompt: PromptSpec, examples: tuple[Piece, ...]) -> list[Query]:
    return [Query(item.images, question_text(item, prompt), item.choices, examples)]


def _query_of_each_image(item: Item, prompt: PromptSpec, examples: tuple[Piece, ...]) -> list[Query]:
    """Return a query for each of two images; where a baseline shows none, two queries without an image."""
    images: Sequence[tuple[ImageSource, ...]] = [(image,) for image in item.images] or [(), ()]
    return [Query(shown, question_text(item, prompt), item.choices, examples) for shown in images]


class Choose:
    """Choose the most likely of an item's choices (``answer: choose``), calibrated by the suite's ``calibrate``."""

    _queries: Queries = staticmethod(_query)

    def baselines(self, items: Sequence[Item]) -> dict[str, bool]:
        """Return the baselines of prompted models."""
        return offered()

    def answers(self, model: Assembly, items: Sequence[Item], context: Context) -> dict[str, list[str]]:
        """Return the chosen texts."""
        scores = _log_likelihoods(model, items, context)
        return {name: chosen(rows, context.suite.calibrate) for name, rows in scores.items()}

    def unanswerable(self, model: Assembly, items: Sequence[Item], context: Context) -> dict[int, str]:
        """Return the items of which the prompt and a choice do not fit into the language model's context."""
        check_scoring(model.lm)

        def check(prompt: list[Piece], query: Query) -> None:
            check_candidates(model.lm, len(model.encode(prompt).ids), query.choices)

        return unanswerable(model, items, context, self._queries, check, grouped=False)

    def shown_images(self, item: Item, answer: str) -> tuple[ImageSource, ...]:
        """Return the item's images."""
        return item.images


class Order(Choose):
    """Order all of an item's choices by likelihood (``answer: order``)."""

    def answers(self, model: Assembly, items: Sequence[Item], context: Context) -> dict[str, list[str]]:
        """Return the choices' indices, counted from 0, the most likely first."""
        scores = _log_likelihoods(model, items, context)
        return {name: list(map(_ordered, items, rows)) for name, rows in scores.items()}


class Match(Choose):
    """Match two images with two captions (``answer: match``), by the likelihood of each caption after each image."""

    _queries: Queries = staticmethod(_query_of_each_image)

    def answers(self, model: Assembly, items: Sequence[Item], context: Context) -> dict[str, list[str]]:
        """Return the tests that each item passed, of ``text``, ``image`` and ``group``."""
        for item in items:
            if len(item.images) != 2 or len(item.choices) != 2:
                raise MLLMError(
                    f"Item {item.id!r} has {len(item.images)} images and {len(item.choices)} choices; "
                    "answer=match needs two of each."
                )
        replies = Asking(context, self._queries, _scored, grouped=False).replies(model, items)
        return {name: list(map(matched, items, rows)) for name, rows in replies.items()}


def _log_likelihoods(model: Assembly, items: Sequence[Item], context: Context) -> dict[str, list[Scores]]:
    """Return the log-likelihoods of each item's choices, by the name of the condition."""
    for item in items:
        if not item.choices:
            raise MLLMError(f"Item {item.id!r} has no choices; answer={context.suite.answer} needs them.")
    replies = Asking(context, _query, _scored, grouped=False).replies(model, items)
    return {name: [scores for (scores,) in rows] for name, rows in replies.items()}


def _scored(views: Views, batch: Sequence[Group]) -> list[dict[str, float]]:
    """Return each choice's log-likelihood, for each query of a batch."""
    pairs = [(view, query) for (_, queries), view in zip(batch, views, strict=True) for query in queries.values()]
    return [dict(zip(query.choices, view.score(query.choices), strict=True)) for view, query in pairs]


def chosen(scores: Sequence[Scores], calibrate: float) -> list[str]:
    """Return each item's choice of the highest score, less a share of the choice's mean score over all items.

    A choice that is likely with any image says little about the image. This is batch calibration (arXiv:2309.17249;
    there the share is 1). It needs all items together, and none of their references.

    Args:
        scores: of each item, by choice.
        calibrate: the share of the mean that is subtracted; 0: none.
    """
    by_choice: dict[str, list[float]] = defaultdict(list)
    for row in scores:
        for choice, score in row.items():
            by_choice[choice].append(score)
    prior = {choice: calibrate * float(np.mean(values)) for choice, values in by_choice.items()}
    return [max(row, key=lambda choice: row[choice] - prior[choice]) for row in scores]


def _ordered(item: Item, scores: Scores) -> str:
    indices = sorted(range(len(item.choices)), key=lambda index: -scores[item.choices[index]])
    return " ".join(map(str, indices))


def matched(item: Item, scores: Sequence[Scores]) -> str:
    """Return the tests that two images and two captions pass, from the captions' scores after each image.

    ``text``: each image prefers its own caption; ``image``: each caption its own image; ``group``: both.
    """
    first, second = item.choices
    text = scores[0][first] > scores[0][second] and scores[1][second] > scores[1][first]
    image = scores[0][first] > scores[1][first] and scores[1][second] > scores[0][second]
    return " ".join(name for name, passed in zip(TESTS, (text, image, text and image), strict=True) if passed)
