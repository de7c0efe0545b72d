"""What a reader returns: pictures with captions, with a question and its answers, a conversation, or a document."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from mllm.config.parts import PromptSpec
from mllm.media.images import ImageSource
from mllm.prompts.messages import rendered
from mllm.prompts.pieces import Piece, Target, answer_text, arrange

SEPARATOR = "\n"  # behind an example that another one follows


@dataclass(frozen=True)
class Item:
    """One item of a data set, before any prompt is put around it."""

    id: str
    images: tuple[ImageSource, ...]
    answers: tuple[str, ...]  # reference captions, or the annotators' answers (repetitions count)
    question: str | None = None  # None: a caption is wanted
    kind: str = ""  # what results are broken down by, e.g. "yes/no"
    choices: tuple[str, ...] = ()  # the closed set an answer is chosen from, where there is one
    shots: tuple[Item, ...] = ()  # solved examples that are shown before it
    messages: tuple[dict[str, Any], ...] = ()  # a whole conversation to learn from, in place of question and answers
    document: tuple[str | ImageSource, ...] = ()  # texts and pictures as they stand in a page, to learn from


def question_text(item: Item, prompt: PromptSpec) -> str:
    """Return the words an item is put with: the caption prompt, or its question in the question prompt.

    An empty question puts none.
    """
    if item.question is None:
        return prompt.caption
    return prompt.question.format(question=item.question) if item.question else ""


def pieces_of(item: Item, prompt: PromptSpec, answer: str | None = None, lm: Any = None) -> list[Piece]:
    """Return an item as an interleaved prompt; with ``answer``, or if it holds it all itself, as a training example.

    ``lm`` is needed for conversations in the language model's own chat template. Of examples before the item nothing is
    learnt.
    """
    if item.messages:
        return rendered(item.messages, prompt, lm, learn=True)
    if item.document:
        return _learnt(item.document)
    target = [] if answer is None else [Target(answer_text(answer))]
    return [*before(item, prompt), *arrange(prompt.template, item.images, question_text(item, prompt)), *target]


def before(item: Item, prompt: PromptSpec, separator: str = SEPARATOR) -> tuple[Piece, ...]:
    """Return an item's examples as the pieces before it; of an example's answers the most frequent one is used."""
    pieces: list[Piece] = []
    for shot in item.shots:
        answer = Counter(shot.answers).most_common(1)[0][0]
        pieces += arrange(prompt.template, shot.images, question_text(shot, prompt))
        pieces.append(answer_text(answer) + separator)
    return tuple(pieces)


def _learnt(document: tuple[str | ImageSource, ...]) -> list[Piece]:
    """Return a document with all its text as targets; pictures behind the last text teach nothing and are left out.

    Nothing ends where a picture stands between texts: only the document's own end is learnt as one.
    """
    last = max(place for place, piece in enumerate(document) if isinstance(piece, str))
    whole = last == len(document) - 1
    return [
        Target(piece, ends=whole and place == last) if isinstance(piece, str) else piece
        for place, piece in enumerate(document[: last + 1])
    ]
