"""From items to answers: what is put to the model, in which batches, and what its likelihoods come to.

What several items have in common is computed once: the images that several questions are about, the examples that
stand before all of them, and whatever was put before in the same words.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from mllm.eval.baselines import Condition
from mllm.eval.journal import Journal
from mllm.eval.suite import Suite

from mllm.answering.view import View, Views
from mllm.assembly import Assembly
from mllm.data.items import Item, before, question_text
from mllm.errors import MLLMError
from mllm.media.images import ImageSource
from mllm.processes import processes
from mllm.prompts.pieces import Piece, arrange

TESTS = ("text", "image", "group")  # what images and captions that are matched can pass


@dataclass(frozen=True)
class Query:
    """What is put to the model: examples, images, words, and the answers it may choose from."""

    images: tuple[ImageSource, ...]
    text: str
    choices: tuple[str, ...] = ()
    before: tuple[Piece, ...] = ()


Group = tuple[list[Piece], dict[str, Query]]  # a prompt that is seen once, and what follows it


class Answering:
    """Answers the items of one suite, a condition at a time; an answer that is known is not asked for again.

    Several processes share the batches; each has all answers afterwards.
    """

    def __init__(self, config: Suite, items: Sequence[Item], journal: Journal) -> None:
        self._config, self._items, self._journal = config, items, journal
        self._known: dict[tuple[Assembly, Query], Any] = {}
        self._state = processes()

    def answers(self, condition: Condition, name: str, bar: Any) -> list[str]:
        """Return each item's answer under a condition; ``name`` is the journal's for it, and what ``bar`` shows."""
        model, config = condition.model, self._config
        queries = [self._queries(condition, index) for index in range(len(self._items))]
        order = list({query: None for query in chain(*queries) if (model, query) not in self._known})
        batches = list(_batches(model, config, order))
        task, found, here = bar.add_task(name, total=len(order), note=""), {}, self._state.process_index
        for number in range(here, len(batches), self._state.num_processes):
            # Batches are made the same way when an evaluation goes on, or runs on more processes.
            key = f"{name}/{number}"
            answers = self._journal.get(key)
            if answers is None:
                answers = self._answered(model, batches[number], queries)
                self._journal.put(key, answers)
            found[number] = answers
            bar.update(task, advance=sum(len(own) for _, own in batches[number]) * self._state.num_processes)
        for number, answers in gather_object(list(found.items())):
            own = [query for _, group in batches[number] for query in group.values()]
            self._known.update(zip(((model, query) for query in own), answers, strict=True))
        return _folded(config, self._items, [[self._known[model, query] for query in own] for own in queries])

    def _queries(self, condition: Condition, index: int) -> list[Query]:
        """Return what is asked for one item: one thing, or where images are matched, one for each image."""
        item, prompt = self._items[index], condition.model.spec.prompt
        images, text = condition.images(index), question_text(item, prompt)
        shots = before(item, prompt, self._config.shots.separator, sighted=condition.sighted)
        if self._config.answer == "match":
            each: list[tuple[ImageSource, ...]]
            each = [(image,) for image in images] if images else [()] * len(item.images)
            return [Query(own, text, item.choices, shots) for own in each]
        if self._config.answer in ("choose", "order"):
            return [Query(images, text, item.choices, shots)]
        return [Query(images, text, before=shots)]

    def _answered(self, model: Assembly, batch: Sequence[Group], queries: Sequence[Sequence[Query]]) -> list[Any]:
        """Return a batch's answers, or each choice's log-likelihood, in the order of its texts."""
        views = _seen(model, batch)
        if self._config.answer == "generate":
            return list(chain(*views.continue_with([list(own) for _, own in batch], **self._config.decoding)))
        pairs = [(view, query) for (_, own), view in zip(batch, views, strict=True) for query in own.values()]
        scores = [_scores(view, query.choices) for view, query in pairs]
        for score, (_, query) in zip(scores, pairs, strict=True):
            if not all(map(math.isfinite, score.values())):
                item = next(i for i, own in zip(self._items, queries, strict=True) if query in own)
                raise MLLMError(f"Item {item.id!r}: a choice's log-likelihood is not finite. Did training diverge?")
        return scores


def _batches(model: Assembly, config: Suite, queries: Sequence[Query]) -> Iterator[list[Group]]:
    """Yield prompts, each with the texts that follow it, some ``batch_size`` texts at a time.

    Images are one prompt for all that is asked about them. A question without images, or whose answers are scored, is
    a prompt itself, with nothing to follow. Prompts come by their number of images and length, so that little is
    padding.
    """
    template, shared = model.spec.prompt.template, config.answer == "generate"
    groups: dict[Any, Group] = {}
    for query in queries:
        if query.images and shared:
            prompt = [*query.before, *arrange(template, query.images)]
            groups.setdefault((query.before, query.images), (prompt, {}))[1][query.text] = query
        else:
            groups[query] = ([*query.before, *arrange(template, query.images, query.text)], {"": query})
    batch: list[Group] = []
    for group in sorted(groups.values(), key=lambda group: _length(group[0])):
        batch.append(group)
        if sum(len(own) for _, own in batch) >= config.batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _length(prompt: Sequence[Piece]) -> tuple[int, int]:
    """Return the number of a prompt's images, and of its characters."""
    words = [piece for piece in prompt if isinstance(piece, str)]
    return len(prompt) - len(words), sum(map(len, words))


def _seen(model: Assembly, batch: Sequence[Group]) -> Views:
    """See a batch's prompts; examples that stand before all of them are seen once."""
    shots = {next(iter(own.values())).before for _, own in batch}
    common = shots.pop() if len(shots) == 1 else ()
    if not common or len(batch) == 1:
        return model.see_each([prompt for prompt, _ in batch])
    start = model.see(list(common))
    return Views(model, [prompt[len(common) :] for prompt, _ in batch], before=[start] * len(batch))


def _scores(view: View, choices: Sequence[str]) -> dict[str, float]:
    if not choices:
        raise MLLMError("This suite chooses among given answers, and the data has none.")
    return dict(zip(choices, view.score(choices), strict=True))


def _folded(config: Suite, items: Sequence[Item], found: Sequence[Sequence[Any]]) -> list[str]:
    """Return each item's answer, from what was found for its queries."""
    if config.answer == "match":
        return [matched(item, scores) for item, scores in zip(items, found, strict=True)]
    first = [answers[0] for answers in found]
    if config.answer == "order":
        return [ordered(item, scores) for item, scores in zip(items, first, strict=True)]
    return chosen(first, config.calibrate) if config.answer == "choose" else first


def matched(item: Item, scores: Sequence[dict[str, float]]) -> str:
    """Return the tests that two images and two captions passed, each image's captions scored."""
    if len(scores) != 2 or len(item.choices) != 2:
        raise MLLMError(f"Item {item.id!r}: two images and two captions are matched, here are {len(scores)} images.")
    first, second = item.choices
    text = scores[0][first] > scores[0][second] and scores[1][second] > scores[1][first]
    image = scores[0][first] > scores[1][first] and scores[1][second] > scores[0][second]
    return " ".join(name for name, passed in zip(TESTS, (text, image, text and image), strict=True) if passed)


def ordered(item: Item, scores: dict[str, float]) -> str:
    """Return the places of an item's choices, counted from 0, the most likely first."""
    places = sorted(range(len(item.choices)), key=lambda place: -scores[item.choices[place]])
    return " ".join(map(str, places))


def chosen(scores: Sequence[dict[str, float]], calibrate: float) -> list[str]:
    """Return each item's most likely answer, less a share of the answer's mean score over all items.

    An answer that is likely whatever is seen says little about what is seen. This is batch calibration
    (arXiv:2309.17249; there the share is 1). It needs the items together, and none of their references.
    """
    by_answer: dict[str, list[float]] = defaultdict(list)
    for row in scores:
        for answer, score in row.items():
            by_answer[answer].append(score)
    prior = {answer: calibrate * float(np.mean(values)) for answer, values in by_answer.items()}
    return [max(row, key=lambda answer: row[answer] - prior[answer]) for row in scores]


def closest(items: Sequence[Item], scorer: Any, calibrate: float) -> list[str]:
    """Return each item's choice that the scorer finds closest to its picture: zero-shot classification.

    ``calibrate``: the share of a choice's mean cosine over all items that is taken off, as in `chosen`.
    """
    if wrong := next((item for item in items if not item.choices or len(item.images) != 1), None):
        raise MLLMError(f"Item {wrong.id!r}: closest needs one picture and choices; take a suite that chooses.")
    pictures = list(dict.fromkeys(item.images[0] for item in items))
    words = list(dict.fromkeys(chain.from_iterable(dict.fromkeys(item.choices for item in items))))
    cosines = scorer.image_text(pictures, words).tolist()
    rows = {picture: dict(zip(words, row, strict=True)) for picture, row in zip(pictures, cosines, strict=True)}
    return chosen([{text: rows[item.images[0]][text] for text in item.choices} for item in items], calibrate)
