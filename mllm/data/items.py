"""What a reader returns: one picture (or several) with captions, or with a question and its answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mllm.images import ImageSource
from mllm.prompt import Piece, Target, answer_text, arrange
from mllm.spec import PromptSpec
from mllm.turns import rendered


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


def question_text(item: Item, prompt: PromptSpec) -> str:
    """Return the words an item is put with: the caption prompt, or its question in the question prompt.

    An empty question puts none.
    """
    if item.question is None:
        return prompt.caption
    return prompt.question.format(question=item.question) if item.question else ""


def pieces_of(item: Item, prompt: PromptSpec, answer: str | None = None, lm: Any = None) -> list[Piece]:
    """Return an item as an interleaved prompt; with ``answer``, or if it is a conversation, as a training example.

    ``lm`` is needed for conversations in the language model's own chat template.
    """
    if item.messages:
        return rendered(item.messages, prompt, lm, learn=True)
    target = [] if answer is None else [Target(answer_text(answer))]
    return [*arrange(prompt.template, item.images, question_text(item, prompt)), *target]
