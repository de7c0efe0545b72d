"""Name in a prompt the entities that an image shows: words of a vocabulary, behind its last image (ViECap's prompt)."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import cache

from mllm.config.prompt import EntitiesSpec
from mllm.errors import MLLMError
from mllm.prompts.pieces import Piece, is_image
from mllm.system import read_regular


def vocabulary_of(spec: EntitiesSpec) -> tuple[str, ...]:
    """Return the words of a vocabulary, each once.

    Raises:
        MLLMError: its file cannot be read, or has no words.
    """
    lines = _lines(spec.of) if isinstance(spec.of, str) else spec.of
    words = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not words:
        raise MLLMError("prompt.entities.of has no words: expected a list, or a file with a word on each line.")
    return words


def of_caption(spec: EntitiesSpec, caption: str | None, generator: random.Random) -> str:
    """Return the text that names a caption's entities in training, some of them left out."""
    words = entities_in(caption or "", vocabulary_of(spec))[: spec.most]
    return named(spec, [word for word in words if generator.random() >= spec.drop])


def entities_in(caption: str, vocabulary: tuple[str, ...]) -> list[str]:
    """Return the words of a vocabulary that a caption contains, also in the plural, in order and each once."""
    names = {word.lower(): word for word in vocabulary}
    return list(dict.fromkeys(names[match[1].lower()] for match in _pattern(vocabulary).finditer(caption)))


def named(spec: EntitiesSpec, words: Sequence[str]) -> str:
    """Return the text that names words."""
    return spec.text.format(entities=", ".join(words) or spec.none)


def behind_last_image(pieces: Sequence[Piece], text: str) -> list[Piece]:
    """Return a prompt with a text behind its last image; without an image, as it is."""
    places = [number for number, piece in enumerate(pieces, start=1) if is_image(piece)]
    if not places or not text:
        return list(pieces)
    return [*pieces[: places[-1]], text, *pieces[places[-1] :]]


@cache
def _pattern(vocabulary: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(vocabulary, key=len, reverse=True)
    return re.compile(rf"(?<!\w)({'|'.join(map(re.escape, longest_first))})(?:e?s)?(?!\w)", re.IGNORECASE)


@cache
def _lines(file: str) -> list[str]:
    try:
        return read_regular(file).decode("utf-8-sig").splitlines()
    except FileNotFoundError:
        raise MLLMError(f"prompt.entities.of is {file!r}, and there is no such file or folder.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise MLLMError(
            f"prompt.entities.of is {file!r}, which cannot be read: {error}. Give a text file with a word on each line."
        ) from None
