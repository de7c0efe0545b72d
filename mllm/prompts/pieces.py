"""Define the pieces of an interleaved prompt: texts, images, targets and the control words of a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """Text that is a target of training: the loss is on its tokens and, if it ``ends``, on the end token after it."""

    text: str
    ends: bool = True


@dataclass(frozen=True)
class Control:
    """Text of a chat template, in which control tokens are recognised."""

    text: str


Piece = Any  # a str, a Target, a Control, or an image (a PIL image, an array, a path object, bytes, an ImageSource)


def arrange(template: str, images: Sequence[Piece], text: str = "") -> list[Piece]:
    """Return images and a text as a prompt, in the order of a template such as ``A photo of{images}. {prompt}``."""
    before, _, rest = template.partition("{images}")
    between = rest.removesuffix("{prompt}")
    return [*([before] if before else []), *images, *([between + text] if between + text else [])]


def answer_text(answer: str) -> str:
    """Return an answer as it follows a prompt: after a space."""
    return f" {answer.strip()}"


def images_of(pieces: Sequence[Piece]) -> list[Any]:
    """Return the images of a prompt, in order."""
    return [piece for piece in pieces if not isinstance(piece, str | Target | Control)]


def trailing_text(pieces: Sequence[Piece]) -> str:
    """Return the text at the end of a prompt, after its last image."""
    pieces = joined(pieces)
    return pieces[-1] if pieces and isinstance(pieces[-1], str) else ""


def without_images(pieces: Sequence[Piece]) -> list[Piece]:
    """Return a prompt's text alone."""
    return [piece for piece in pieces if isinstance(piece, str | Target | Control)]


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Join neighbouring texts and leave out empty ones."""
    merged: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, str) and merged and isinstance(merged[-1], str):
            merged[-1] += piece
        elif not (isinstance(piece, str) and piece == ""):
            merged.append(piece)
    return merged
