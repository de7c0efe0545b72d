"""Define the pieces of an interleaved prompt: texts, images, targets and the control words of a chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple


@dataclass(frozen=True)
class Target:
    """Text that is a target of training: the loss is on its tokens and, if it ``ends``, on the end token after it.

    In a conversation that is answered, the assistant's earlier turns are targets, too, without any effect.
    """

    text: str
    ends: bool = True


class Given(str):
    """Text that asks nothing: a system prompt, a solved example's answer, an assistant's earlier turn.

    It ends a turn: what an image is asked stands in the same turn (`mllm.prompts.questions`).
    """


@dataclass(frozen=True)
class Control:
    """Text in which control tokens are recognised."""

    text: str


@dataclass(frozen=True)
class Template(Control):
    """Text that a chat template writes around the turns of a conversation.

    A prompt that contains such a piece is a conversation in the language model's chat template: it is tokenized as a
    whole, and nothing is put before it.

    Args:
        learned: the loss is on its tokens: what the model generates around an answer's text, such as the end of turn.
    """

    learned: bool = False


Piece = Any  # a str, a Target, a Control, or an image (a PIL image, an array, a path object, bytes, an ImageSource)


# The visual tokens of an image in the sequence: as many for every image, or a function of the image. A number is known
# without a look at the image.
Counts = int | Callable[[Any], int]


class Part(NamedTuple):
    """A text to tokenize, or an image (None), and which control tokens are recognised in it.

    ``words`` are those that are not special, such as ``<think>``.
    """

    text: str | None
    recognised: Literal["all", "words", "none"] = "none"


class Token(NamedTuple):
    """A token: its id, or None for an image, and the numbers of the first and the last part it has characters of."""

    id: int | None
    first: int
    last: int


def is_image(piece: Piece) -> bool:
    """Whether a piece is an image: it is no text."""
    return not isinstance(piece, str | Target | Control)


def text_of(piece: Piece) -> str:
    """Return the text of a piece that is no image."""
    return str(piece if isinstance(piece, str) else piece.text)


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return the length of the longest common beginning of two sequences."""
    different = (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(different, min(len(one), len(other)))


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
    return [piece for piece in pieces if is_image(piece)]


def counted(images: Sequence[Any], counts: Counts) -> list[int]:
    """Return how many visual tokens each image takes."""
    return [counts if isinstance(counts, int) else counts(image) for image in images]


def trailing_text(pieces: Sequence[Piece]) -> str:
    """Return the text at the end of a prompt, after its last image."""
    pieces = joined(pieces)
    return pieces[-1] if pieces and isinstance(pieces[-1], str) else ""


def without_images(pieces: Sequence[Piece]) -> list[Piece]:
    """Return a prompt's text alone."""
    return [piece for piece in pieces if not is_image(piece)]


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Join neighbouring texts and leave out empty ones."""
    merged: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, str) and merged and isinstance(merged[-1], str):
            merged[-1] += piece
        elif not (isinstance(piece, str) and piece == ""):
            merged.append(piece)
    return merged
