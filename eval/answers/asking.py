"""Ask a model the queries of a suite's items: from items to queries, to batches, to replies.

What several queries have in common is computed once: the images that several questions are about, the examples before
all of them, and every query that is the same under two conditions.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

from accelerate.utils import gather_object
from mllm.eval.answers.base import Context
from mllm.eval.baselines import conditions
from rich.progress import Progress

from mllm.answering.decode import image_free_prompt
from mllm.answering.view import Views
from mllm.assembly import Assembly
from mllm.capabilities import RunsOnEngine
from mllm.config.prompt import PromptSpec
from mllm.data.items import Item, before
from mllm.errors import MLLMError
from mllm.media.images import ImageSource
from mllm.processes import processes, progress
from mllm.prompts.pieces import Piece, arrange

Result = TypeVar("Result")


@dataclass(frozen=True)
class Query:
    """One thing that a model is asked: examples, images, a text, and the answers to choose from."""

    images: tuple[ImageSource, ...]
    text: str
    choices: tuple[str, ...] = ()
    before: tuple[Piece, ...] = ()
    kind: str = "question"  # by which options of the recipe's decoding it is answered: caption or question


Queries = Callable[[Item, PromptSpec, tuple[Piece, ...]], list[Query]]


def whole_prompt(query: Query, template: str, *, grouped: bool) -> tuple[list[Piece], str]:
    """Return the prompt of a query that is encoded once for all queries on its images, and the text that follows it."""
    if query.images and grouped:
        return [*query.before, *arrange(template, query.images)], query.text
    return [*query.before, *arrange(template, query.images, query.text)], ""


def unanswerable(
    model: Assembly,
    items: Sequence[Item],
    context: Context,
    queries: Queries,
    check: Callable[[list[Piece], Query], None],
    *,
    grouped: bool,
) -> dict[int, str]:
    """Return the indices of the items whose queries do not fit into the language model's context, with the errors.

    Args:
        model: the model.
        items: of the suite.
        context: the evaluation.
        queries: as for `Asking`.
        check: raises an `MLLMError` if a query, given its whole prompt, does not fit.
        grouped: as for `Asking`.
    """
    prompt, separator, errors = model.spec.prompt, context.suite.shots.separator, {}
    for index, item in enumerate(items):
        for query in queries(item, prompt, before(item, prompt, separator)):
            pieces, text = whole_prompt(query, prompt.template, grouped=grouped)
            try:
                check([*pieces, text] if text else pieces, query)
            except MLLMError as error:
                errors[index] = str(error)
    return errors


Group = tuple[list[Piece], dict[str, Query]]  # a prompt that is encoded once, and its queries by the text that follows
Reply = Any  # a generated text, or the log-likelihood of each choice: what the journal can write as JSON


class Asking:
    """Ask all queries of a suite, one condition after another; a query that was asked before is not asked again.

    Several processes share the batches, and each has all replies afterwards.

    Args:
        context: the evaluation.
        queries: returns an item's queries in a model's prompt format, given the examples before it.
        reply: returns the replies to a batch of groups, in the order of their queries, from the views of their prompts.
        grouped: whether queries on the same images share one prompt, and their texts follow it.
    """

    def __init__(
        self,
        context: Context,
        queries: Queries,
        reply: Callable[[Views, Sequence[Group]], list[Reply]],
        *,
        grouped: bool,
    ) -> None:
        self._context, self._queries, self._reply, self._grouped = context, queries, reply, grouped
        self._replies: dict[tuple[Assembly, Query], Reply] = {}
        self._start: tuple[Any, Any] = (None, None)  # the model and the examples that were encoded last, and their view
        self._encoding = threading.Lock()

    def replies(self, model: Assembly, items: Sequence[Item]) -> dict[str, list[list[Reply]]]:
        """Return the replies to each item's queries, by the name of the condition."""
        replies = {}
        with progress() as bar:
            for name, condition in conditions(model, items, self._context.baselines).items():
                queries = [self._queries_for(item, condition.model.spec.prompt) for item in condition.items]
                self._ask(name, condition.model, condition.items, queries, bar)
                replies[name] = [[self._replies[condition.model, query] for query in group] for group in queries]
        return replies

    def _queries_for(self, item: Item, prompt: PromptSpec) -> list[Query]:
        return self._queries(item, prompt, before(item, prompt, self._context.suite.shots.separator))

    def _ask(
        self, name: str, model: Assembly, items: Sequence[Item], queries: Sequence[Sequence[Query]], bar: Progress
    ) -> None:
        """Ask the queries that are new, in batches that are the same for any number of processes."""
        new = list({query: None for query in chain(*queries) if (model, query) not in self._replies})
        batches = list(self._batches(new, model.spec.prompt.template))
        names = {query: item.id for item, group in zip(items, queries, strict=True) for query in group}
        state, computed = processes(), {}
        task = bar.add_task(name, total=len(new), note="")

        def replied(number: int) -> tuple[int, list[Reply]]:
            return number, self._replied(f"{name}/{number}", model, batches[number], names)

        numbers = range(state.process_index, len(batches), state.num_processes)
        for number, replies in finished(replied, numbers, self._at_once(model)):
            computed[number] = replies
            bar.update(task, advance=len(_queries_of(batches[number])) * state.num_processes)
        for number, replies in gather_object(list(computed.items())):
            keys = [(model, query) for query in _queries_of(batches[number])]
            self._replies.update(zip(keys, replies, strict=True))

    def _at_once(self, model: Assembly) -> int:
        """Return how many batches are asked at the same time: as many as keep an engine busy; without one, one."""
        if not isinstance(model.lm, RunsOnEngine):
            return 1
        return max(2, model.lm.engine.in_flight // self._context.suite.batch_size)

    def _batches(self, queries: Sequence[Query], template: str) -> Iterator[list[Group]]:
        """Yield groups, with some ``batch_size`` queries at a time.

        Prompts are sorted by their number of images and their length, so that batches have little padding.
        """
        groups: dict[Any, Group] = {}
        for query in queries:
            prompt, text = whole_prompt(query, template, grouped=self._grouped)
            shared = query.images and self._grouped
            groups.setdefault((query.before, query.images) if shared else query, (prompt, {}))[1][text] = query
        batch: list[Group] = []
        for group in sorted(groups.values(), key=lambda group: _length(group[0])):
            batch.append(group)
            if len(_queries_of(batch)) >= self._context.suite.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def _replied(self, key: str, model: Assembly, batch: Sequence[Group], names: dict[Query, str]) -> list[Reply]:
        """Return the replies to a batch, from the journal if it has them."""
        replies = self._context.journal.get(key)
        if replies is None:
            with self._encoding:  # an engine has the views' embeddings while others are encoded
                views = self._views(model, batch)
            replies = self._reply(views, batch)
            for query, reply in zip(_queries_of(batch), replies, strict=True):
                if isinstance(reply, dict) and not all(map(math.isfinite, reply.values())):
                    raise MLLMError(
                        f"Item {names[query]!r}: a choice's log-likelihood is not finite. Did training diverge?"
                    )
            self._context.journal.put(key, replies)
        return replies

    def _views(self, model: Assembly, batch: Sequence[Group]) -> Views:
        """Encode a batch's prompts; examples that all of them begin with are encoded once, and kept for later ones.

        Where a recipe's prompt is the image alone, an end token is left of it without the image.
        """
        examples = {query.before for query in _queries_of(batch)}
        shared = examples.pop() if len(examples) == 1 else ()
        if not shared or len(batch) == 1:
            return model.see_each([prompt or image_free_prompt(model, prompt) for prompt, _ in batch])
        if (model, shared) != self._start[0]:
            self._start = (model, shared), model.see(list(shared))
        return Views(model, [prompt[len(shared) :] for prompt, _ in batch], before=[self._start[1]] * len(batch))


def finished(call: Callable[[int], Result], numbers: Sequence[int], at_once: int) -> Iterator[Result]:
    """Yield the result of a function for each number, as it comes; ``at_once`` are computed at the same time.

    Where one fails, those that have not begun are not computed any more.
    """
    if at_once == 1:
        yield from map(call, numbers)
        return
    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(call, number) for number in numbers]
        try:
            yield from (future.result() for future in as_completed(futures))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _queries_of(batch: Sequence[Group]) -> list[Query]:
    return [query for _, queries in batch for query in queries.values()]


def _length(prompt: Sequence[Piece]) -> tuple[int, int]:
    """Return the number of a prompt's images, and of its characters."""
    texts = [piece for piece in prompt if isinstance(piece, str)]
    return len(prompt) - len(texts), sum(map(len, texts))
