"""Write images and words in a recipe's prompt format, behind its solved examples."""

from __future__ import annotations

from collections.abc import Sequence

from mllm.config.prompt import PromptSpec
from mllm.media.images import source_of
from mllm.prompts.pieces import Given, Piece, answer_text, arrange

SEPARATOR = "\n"  # between an example and the next


def query_text(prompt: PromptSpec, question: str | None) -> str:
    """Return the caption prompt, or a question in the question prompt; an empty question gives an empty text."""
    if question is None:
        return prompt.caption
    return prompt.question.format(question=question) if question else ""


def formatted(prompt: PromptSpec, images: Sequence[Piece], text: str = "") -> list[Piece]:
    """Return a prompt: the recipe's system prompt and examples, then images and a text in the order of its template."""
    return [*preamble(prompt), *arrange(prompt.template, images, text)]


def preamble(prompt: PromptSpec) -> list[Piece]:
    """Return the recipe's system prompt and its solved examples, as pieces; words stand in an image's place."""
    pieces: list[Piece] = [Given(prompt.system)] if prompt.system else []
    for example in prompt.examples:
        shown = answer_text(example.words) if example.image is None else source_of(example.image)
        pieces += solved(prompt, [shown], example.question, example.answer)
    return pieces


def solved(
    prompt: PromptSpec, images: Sequence[Piece], question: str | None, answer: str, separator: str = SEPARATOR
) -> list[Piece]:
    """Return one solved example; ``question`` None: its answer is a caption."""
    return [*arrange(prompt.template, images, query_text(prompt, question)), Given(answer_text(answer) + separator)]
