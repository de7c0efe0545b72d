"""Measure the sequence length of an example, and shorten one that is too long, never inside an image."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

from mllm.errors import MLLMError
from mllm.media.sizes import label_of
from mllm.prompts.batch import IGNORED, encode
from mllm.prompts.pieces import Counts, Piece, Target, Template, counted, images_of

MOST = 4  # images that an error names


def length_of(pieces: Sequence[Piece], lm: Any, num_visual: Counts) -> int:
    """Return the sequence length of an example, its visual tokens included."""
    return len(encode(pieces, lm=lm, num_visual=num_visual).ids)


def too_long(pieces: Sequence[Piece], length: int, context: int, num_visual: Counts) -> MLLMError:
    """Return the error of a prompt that has more tokens than the language model's context."""
    images = images_of(pieces)
    counts = counted(images, num_visual)
    shown = f"{len(images)} images of {num_visual} tokens each"
    if not isinstance(num_visual, int):
        named = [f"{label_of(image)}: {count} tokens" for image, count in zip(images, counts, strict=True)]
        shown = "; ".join(named[:MOST]) + (f"; {len(named) - MOST} more images" if len(named) > MOST else "")
        shown = shown or "no image"
    less = "" if isinstance(num_visual, int) else ", or let the encoder give an image or a video fewer tokens"
    return MLLMError(
        f"The prompt has {length} tokens ({shown}), and the language model's context is {context} tokens. "
        f"Shorten it{less}."
    )


def shortened(pieces: list[Piece], limit: int, lm: Any, num_visual: Counts, *, cut: bool) -> list[Piece]:
    """Return an example of at most ``limit`` tokens.

    Args:
        pieces: the example.
        limit: of the sequence length.
        lm: the language model.
        num_visual: the visual tokens of an image: a number, or a function of the image.
        cut: truncate text at the end, between words, and where that is not enough remove whole images. A truncated
            target has no end token.

    Raises:
        MLLMError: it is too long and ``cut`` is off, or no target token would be left.
    """
    length = length_of(pieces, lm, num_visual)
    if length <= limit:
        return pieces
    if not cut:
        raise MLLMError(f"{length} tokens, and data.max_length is {limit}: data.truncate=text would truncate its text.")
    kept = list(pieces)
    while kept and length_of(kept, lm, num_visual) > limit:
        last = kept.pop()
        if isinstance(last, str | Target):
            kept += _head(kept, last, limit, lm, num_visual)
    while kept and not _is_end(kept):  # nothing is learned after the last target
        kept.pop()
    if all(label == IGNORED for label in encode(kept, lm=lm, num_visual=num_visual).labels):
        raise MLLMError(f"{length} tokens, and no target token within data.max_length={limit}.")
    return kept


def _is_end(pieces: Sequence[Piece]) -> bool:
    """Whether pieces end with a target, or with what a chat template has learned behind it."""
    before, last = [None, *pieces][-2:]
    return isinstance(last, Target) or (isinstance(last, Template) and last.learned and isinstance(before, Target))


def with_short_answers(pieces: Sequence[Piece], limit: int, lm: Any) -> list[Piece]:
    """Return an example whose targets have at most ``limit`` tokens each; a truncated one has no end token."""
    return [_short(piece, limit, lm) if isinstance(piece, Target) else piece for piece in pieces]


def _short(target: Target, limit: int, lm: Any) -> Target:
    text = target.text
    if len(lm.tokenize(text)) <= limit:
        return target
    size = bisect.bisect_right(range(1, len(text)), limit, key=lambda size: len(lm.tokenize(text[:size])))
    return Target(text[: _word_end(text, size)] or text[:size], ends=False)


def _word_end(text: str, size: int) -> int:
    """Return where the last whole word of the first ``size`` characters ends; ``size`` if there is none."""
    return max((index for index in range(1, size + 1) if text[index].isspace()), default=size)


def _head(before: list[Piece], last: str | Target, limit: int, lm: Any, num_visual: Counts) -> list[Piece]:
    """Return as much of the last text as fits after the pieces before it: a piece, or none."""
    text = last if isinstance(last, str) else last.text

    def piece(size: int) -> Piece:
        return text[:size] if isinstance(last, str) else Target(text[:size], ends=False)

    size = bisect.bisect_right(range(1, len(text)), limit, key=lambda n: length_of([*before, piece(n)], lm, num_visual))
    end = _word_end(text, size)
    return [piece(end)] if end else []
