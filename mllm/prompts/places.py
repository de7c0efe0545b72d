"""Find a conversation's texts and images in what a chat template writes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from mllm.prompts.pieces import Piece, shared_length
from mllm.prompts.rendering import KINDS, PLAIN, Kind, Renderer, Unfit

Mark = tuple[Kind, int]


class Place(NamedTuple):
    """The characters of a rendered conversation that are a text of a turn, or that stand for an image."""

    start: int
    end: int
    turn: int
    role: str
    image: Piece | None  # None: a text


def places(renderer: Renderer, text: str) -> list[Place]:
    """Return where the parts of a conversation stand in a rendering; blank texts stand nowhere.

    Raises:
        Unfit: the template loses a part.
    """
    added = _added_tokens(renderer.tokenizer)
    texts = _texts(renderer, text, added)
    images = _images(renderer, text, texts, added)
    in_order = sorted([*texts, *images], key=lambda place: place.start)
    if any(before.end > after.start for before, after in itertools.pairwise(in_order)):
        raise Unfit(f"The chat template does not keep the turns apart. Change it, {PLAIN}", 1)
    return in_order


def _texts(renderer: Renderer, text: str, added: re.Pattern[str]) -> list[Place]:
    """Return where the texts stand: between their marks in another rendering."""
    marks, ends = _marks(renderer, text)
    positions = dict(zip(marks, ends, strict=True))
    borders = sorted({0, *ends, len(text)})
    texts = []
    for number, (turn, role, part) in enumerate(renderer.parts):
        if part["type"] == "image" or not (core := part["text"].strip()):
            continue
        if marks.count(("start", number)) > 1 or marks.count(("end", number)) > 1:
            raise renderer.lost(number, "its text is there twice")
        start, end = positions.get(("start", number)), positions.get(("end", number))
        if start is None and end is None:
            raise renderer.lost(number, "its text is left out")
        if start is None or end is None:  # a part of it is left out, such as an answer's thinking
            start, end = _rest(text, core, start, end, borders, added)
            if start >= end or (role != "assistant" and end - start < len(core)):
                raise renderer.lost(number, "a part of its text is left out")
        texts.append(Place(start, end, turn, role, None))
    return texts


def _marks(renderer: Renderer, text: str) -> tuple[list[Mark], list[int]]:
    """Return the marks that the template gives back, and their positions in the rendering without marks.

    With both marks of every text; or, where the template looks at how a text begins or ends, with one of them.
    """
    literals, marks = renderer.split(renderer.render(marked=("start", "end")), "start", "end")
    if text == "".join(literals):
        return marks, _ends(literals)
    in_pairs = [mark[0] for mark in marks] == ["start", "end"] * (len(marks) // 2)
    if in_pairs and (cut := _at_same_places(text, literals) or _aligned(text, literals)):
        return marks, _ends(cut)
    for kind in KINDS[:2]:
        literals, marks = renderer.split(renderer.render(marked=(kind,)), kind)
        if text == "".join(literals):
            return marks, _ends(literals)
    texts = [number for number, (_, _, part) in enumerate(renderer.parts) if part["type"] == "text"]
    changed = (n for n in texts if renderer.parts[n].part["text"].strip().casefold() not in text.casefold())
    raise renderer.lost(next(changed, texts[0]), "its text is changed")


def _ends(literals: Sequence[str]) -> list[int]:
    """Return the positions between literals."""
    return list(itertools.accumulate(map(len, literals)))[:-1]


def _at_same_places(text: str, literals: Sequence[str]) -> list[str]:
    """Return what a text has at the places of literals, if every other one, which the template writes, is there."""
    ends = list(itertools.accumulate(map(len, literals)))
    there = [text[end - len(literal) : end] for end, literal in zip(ends, literals, strict=True)]
    return there if len(text) == ends[-1] and there[::2] == list(literals[::2]) else []


def _aligned(text: str, literals: Sequence[str]) -> list[str]:
    """Return a text cut as literals are, if there is exactly one way: every other one is written by the template."""
    templates = [f"({re.escape(literal)})" for literal in literals[::2]]
    matches = [re.fullmatch(between.join(templates), text, re.DOTALL) for between in ("(.*)", "(.*?)")]
    cuts = [list(match.groups()) for match in matches if match]
    return cuts[0] if len(cuts) == 2 and cuts[0] == cuts[1] else []


def _rest(
    text: str, core: str, start: int | None, end: int | None, borders: Sequence[int], added: re.Pattern[str]
) -> tuple[int, int]:
    """Return where the rest of a turn's text stands of which only the start, or only the end, is known."""
    if start is not None:
        after = min(border for border in borders if border > start)
        return start, start + len(core[: shared_length(text[start:after], core)].rstrip())
    assert end is not None
    before = max(border for border in borders if border < end)
    first = end - shared_length(text[before:end][::-1], core[::-1])
    # A token of the template may end as the part before the rest does.
    first = next(
        (token.end() for token in added.finditer(text, before, end) if token.start() < first < token.end()), first
    )
    return end - len(text[first:end].lstrip()), end


def _images(renderer: Renderer, text: str, texts: Sequence[Place], added: re.Pattern[str]) -> list[Place]:
    """Return where the images stand: at their marks, or at what the template writes for them."""
    _, marks = renderer.split(text, "image")
    written: list[tuple[int, int]] = [(place.start, place.end) for place in texts]
    images = []
    for number, (turn, role, part) in enumerate(renderer.parts):
        if part["type"] != "image":
            continue
        if renderer.form == "text":
            if marks.count(("image", number)) != 1:
                raise renderer.lost(number, "its image is left out")
            mark = renderer.mark("image", number)
            start = text.index(mark)
            end = start + len(mark)
        else:
            written.append(_written_for(renderer, number, text, written, added))
            start, end = _inside(text, *written[-1], added)
        images.append(Place(start, end, turn, role, part["image"]))
    return images


def _written_for(
    renderer: Renderer, number: int, text: str, taken: Sequence[tuple[int, int]], added: re.Pattern[str]
) -> tuple[int, int]:
    """Return the characters that the template writes for an image: if it is given twice, they stand there twice."""
    twice = renderer.render(doubled=number)
    size = len(twice) - len(text)
    last = shared_length(text, twice) - size
    first = len(text) - shared_length(text[::-1], twice[::-1])
    candidates = [  # several where the characters around are alike
        (start, start + size)
        for start in range(first, last + 1)
        if all(start >= other_end or start + size <= other_start for other_start, other_end in taken)
    ]
    if size < 1 or not candidates:
        raise renderer.lost(number, "its image is left out")

    def is_word(candidate: tuple[int, int]) -> tuple[int, bool]:
        """Return how much of the characters is added tokens, and whether they are in brackets."""
        written = text[slice(*candidate)]
        tokens = sum(len(match[0]) for match in added.finditer(written))
        return tokens, re.fullmatch(r"\s*(<.*>|\[.*\]|\{.*\}|\(.*\))\s*", written, re.DOTALL) is not None

    return max(candidates, key=is_word)


def _inside(text: str, start: int, end: int, added: re.Pattern[str]) -> tuple[int, int]:
    """Return which of the characters that are written for an image its visual tokens replace.

    Not the blanks around them, and of three or more added tokens not the first and the last one: Qwen2-VL's
    ``<|vision_start|><|image_pad|><|vision_end|>`` has the visual tokens in place of the one in the middle.
    """
    tokens = list(added.finditer(text, start, end))
    if len(tokens) > 2:
        return tokens[0].end(), tokens[-1].start()
    written = text[start:end]
    return start + len(written) - len(written.lstrip()), start + len(written.rstrip())


def _added_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern of the tokenizer's added tokens."""
    words = sorted(filter(str.strip, tokenizer.get_added_vocab()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, words)) or r"(?!)")
