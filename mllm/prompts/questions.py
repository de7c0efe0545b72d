"""Find what an interleaved prompt asks about each of its images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mllm.media.tiles import Layout
from mllm.prompts.pieces import Given, Piece, Target, is_image


def questions_of(pieces: Sequence[Piece]) -> list[str]:
    """Return, for each image of a prompt in order, all text of the turn that it stands in; none is an empty text.

    A turn ends with a `Target` or a `Given`. So an image of an earlier turn keeps its question, however the
    conversation continues, and no answer is part of a question. What a chat template writes is left out.
    """
    questions: list[str] = []
    images, texts = 0, ""
    for piece in [*pieces, Given()]:
        if is_image(piece):
            images += 1
        elif isinstance(piece, Given | Target):
            questions += [texts.strip()] * images
            images, texts = 0, ""
        elif isinstance(piece, str):
            texts += piece
    return questions


def for_units(connector: Any, questions: list[str] | None, layouts: Sequence[Layout] | None) -> tuple[list[str], ...]:
    """Return what a connector takes after features: the question of each unit, or nothing.

    Args:
        connector: the connector.
        questions: of each image; None: it reads images alone.
        layouts: the units of each image; None: one.
    """
    if questions is None:
        return ()
    if layouts is None or connector.padded:
        return (questions,)
    return ([text for text, layout in zip(questions, layouts, strict=True) for _ in range(layout.tiles)],)
