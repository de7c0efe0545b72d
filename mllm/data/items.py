"""Define the items that readers return: images with captions or a question, a conversation, or a document."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from mllm.config.prompt import PromptSpec
from mllm.media.images import ImageSource
from mllm.prompts.formatting import SEPARATOR, preamble, query_text, solved
from mllm.prompts.messages import rendered
from mllm.prompts.pieces import Given, Piece, Target, answer_text, arrange


@dataclass(frozen=True)
class Item:
    """An item of a data set, independent of the prompt format."""

    id: str
    images: tuple[ImageSource, ...]
    answers: tuple[str, ...]  # reference captions, or all annotators' answers, with repetitions
    question: str | None = None  # None: the answer is a caption
    kind: str = ""  # results are broken down by kind, e.g. "yes/no"
    choices: tuple[str, ...] = ()  # the closed set that the answer is chosen from; empty: an open answer
    shots: tuple[Item, ...] = ()  # solved examples in the prompt before it
    messages: tuple[dict[str, Any], ...] = ()  # a conversation to train on, instead of a question and answers
    induction: str = ""  # words before the solved examples, which say what the task is
    document: tuple[str | ImageSource, ...] = ()  # interleaved texts and images of a page, to train on

    @property
    def answer_kind(self) -> str:
        """Return ``caption`` or ``question``: by which options of the recipe's ``decoding`` it is answered."""
        return "caption" if self.question is None else "question"


def question_text(item: Item, prompt: PromptSpec) -> str:
    """Return the text of an item's prompt: the caption prompt, or its question in the question prompt.

    An empty question gives an empty text.
    """
    return query_text(prompt, item.question)


def pieces_of(
    item: Item, prompt: PromptSpec, answer: str | None = None, lm: Any = None, given: str = ""
) -> list[Piece]:
    """Return an item as an interleaved prompt, or as a training example with targets.

    It is a training example if ``answer`` is given, or if the item is a conversation or a document. The item's shots
    contain no targets.

    Args:
        item: the item.
        prompt: the prompt format.
        answer: the target.
        lm: the language model, needed for conversations in its chat template.
        given: words of the answer that belong to the prompt, before the target.
    """
    if item.messages:
        return rendered(item.messages, prompt, lm, learn=True)
    if item.document:
        return _document_pieces(item.document)
    target = [] if answer is None else [Target(answer_text(answer))]
    text = question_text(item, prompt) + (answer_text(given) if given else "")
    return [*before(item, prompt), *arrange(prompt.template, item.images, text), *target]


def before(item: Item, prompt: PromptSpec, separator: str = SEPARATOR) -> tuple[Piece, ...]:
    """Return the pieces before an item: the recipe's preamble, what the task is, and the shots.

    Each shot has its most frequent answer.
    """
    pieces = preamble(prompt) + ([Given(item.induction + separator)] if item.induction else [])
    for shot in item.shots:
        given = [answer for answer in shot.answers if answer.strip()] or shot.answers
        answer = Counter(given).most_common(1)[0][0]
        pieces += solved(prompt, shot.images, shot.question, answer, separator)
    return tuple(pieces)


def _document_pieces(document: tuple[str | ImageSource, ...]) -> list[Piece]:
    """Return a document with all its texts as targets; images after the last text are left out.

    Only the end of the whole document has an end-of-sequence target, not a text that precedes an image.
    """
    last = max(index for index, piece in enumerate(document) if isinstance(piece, str))
    complete = last == len(document) - 1
    return [
        Target(piece, ends=complete and index == last) if isinstance(piece, str) else piece
        for index, piece in enumerate(document[: last + 1])
    ]
