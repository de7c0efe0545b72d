"""Generate `mllm/emoji-scenes` from a seed: captions of, and questions about, rendered scenes.

A fixed rule holds out about a tenth of the kinds of object, and a tenth of the pairs of the other kinds, so that
generalization to unseen objects and to unseen combinations can be measured separately.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache
from itertools import combinations, count, islice
from random import Random

from mllm.data.emoji.image import BACKGROUNDS, SIDE, Kind, Scene, Thing, kinds
from mllm.data.emoji.text import COLOUR, article, captions, groups, noun, phrase, questions
from mllm.data.items import Item
from mllm.errors import MLLMError, near

SPLITS = ("train", "val", "combinations", "kinds")
TASKS = ("captions", "questions", "both", "name", "colour", "objects", "draw", "source")
SINGLE = ("name", "colour", "draw", "source")  # tasks whose scenes have one object
MAX_KINDS = 3
SIZES = {1: (96, 156), 2: (60, 104), 3: (52, 84), 4: (48, 76)}  # of an object in pixels, by number of objects
STILL = (SIDE // 2, SIDE // 2, 180)  # x, y and size of the object in a still scene
MARGIN = 4  # pixels between objects, and to the image's edge
TILT = 30  # maximum rotation in degrees, in either direction
TONE = 8  # maximum difference of red, green and blue from the nominal background colour, of 255


def emoji_scenes(
    *,
    split: str,
    task: str = "captions",
    size: int = 2000,
    seed: int = 0,
    max_objects: int = 4,
    still: bool = False,
) -> list[Item]:
    """Return ``size`` items; item i does not depend on ``size``.

    Args:
        split: "train"; "val", new scenes of the same kinds; "combinations", scenes with a pair of kinds that "train"
            never shows together; "kinds", scenes of kinds that "train" never shows.
        task: "captions" (kind "single" or "multi": one object or several); "questions" (up to three per scene,
            consecutive; the kind is the question's type); "both"; "name": one object, captioned "a red apple", with
            the captions of all kinds of the split as choices; "colour": one object, and the question what colour the
            background is; "objects": several objects, the answers are their names;
            "draw": one object, the question is a caption with the background, and the answer names the object that an
            image should show; or "source": the same question without the image, and the answer is the source of an
            image: "retrieve" for the half of the kinds that an index contains, by a fixed rule, else "generate".
        size: the number of items.
        seed: other seeds give other scenes of the same split.
        max_objects: the most objects in a scene, 1 to 4. About half of the scenes have one ("combinations": none).
        still: scenes have one object, upright, centred and of fixed size, so that a caption determines all but the
            exact shade of the background.

    Raises:
        MLLMError: an unknown split or task, or a number out of range.
    """
    _check(split, task, size, max_objects)
    if still and (task == "objects" or split == "combinations"):
        raise MLLMError(
            f"emoji-scenes has no still scenes of several objects (task {task!r}, split {split!r}): expected one. "
            "Leave out still."
        )
    single = still or task in SINGLE
    return list(islice(_items(split, task, seed, 1 if single else max_objects, still), size))


def names(split: str) -> list[str]:
    """Return the names of the kinds in scenes of a split: the training kinds, or for "kinds" the held-out kinds.

    Raises:
        MLLMError: an unknown split.
    """
    _check(split, "captions", 0, 2)
    return [kind.name for kind in _pool(split)]


def indexed(kind: Kind) -> bool:
    """Return whether task "source" assumes that an index contains images of a kind; it does for about half of them."""
    return hashlib.sha256(f"index {kind.code:X}".encode()).digest()[0] % 2 == 0


def _check(split: str, task: str, size: int, max_objects: int) -> None:
    if split not in SPLITS:
        raise MLLMError(f"emoji-scenes has no split {split!r}. {near(split, SPLITS)}")
    if task not in TASKS:
        raise MLLMError(f"emoji-scenes has no task {task!r}. {near(task, TASKS)}")
    if size < 0:
        raise MLLMError(f"emoji-scenes cannot have size {size}: expected 0 or more. Set size to the number of items.")
    if max_objects not in SIZES:
        raise MLLMError(f"emoji-scenes cannot have max_objects {max_objects}: expected 1 to {max(SIZES)}. Choose one.")
    if split == "combinations" and (task in SINGLE or max_objects == 1):
        raise MLLMError(
            f"emoji-scenes has no scenes of one object in split 'combinations' (task {task!r}, max_objects "
            f"{max_objects}): expected at least two. Choose split 'val', or another task and max_objects from 2."
        )


def _items(split: str, task: str, seed: int, max_objects: int, still: bool) -> Iterator[Item]:
    for index in count():
        random = Random(f"{split}/{seed}/{index}")
        scene = random_scene(split, max_objects, random, still=still)
        name = f"emoji-scenes/{split}/{seed}/{index}{'/still' if still else ''}"
        if task == "name":
            yield Item(name, (scene,), (phrase(scene.things),), kind="single", choices=_choices(split))
        if task == "colour":
            yield Item(name, (scene,), (scene.background,), COLOUR, kind="colour")
        if task in ("draw", "source"):
            description = f"{phrase(scene.things)} on {article(scene.background)} {scene.background} background"
            if task == "draw":
                yield Item(name, (scene,), (phrase(scene.things),), description, kind="single")
            else:
                answer = "retrieve" if indexed(scene.things[0].kind) else "generate"
                yield Item(name, (), (answer,), description, kind=answer)
        if task == "objects" and len(scene.things) > 1:
            yield Item(name, (scene,), tuple(noun(group) for group in groups(scene)), kind="multi")
        if task in ("captions", "both"):
            kind = "single" if len(scene.things) == 1 else "multi"
            yield Item(name, (scene,), captions(scene, Random(name)), kind=kind)
        if task in ("questions", "both"):
            for number, question in enumerate(questions(scene, _pool(split), Random(f"{name}?"))):
                yield Item(f"{name}/{number}", (scene,), (question.answer,), question.text, question.type)


def random_scene(split: str, max_objects: int, random: Random, *, still: bool = False) -> Scene:
    """Return a random scene of a split; see `emoji_scenes`. They are generated until one belongs to it."""
    while True:
        several = split == "combinations" or random.random() < 0.5
        num_things = random.randint(2, max_objects) if several and max_objects > 1 else 1
        chosen = random.sample(_pool(split), min(num_things, random.randint(1, MAX_KINDS)))
        background = random.choice(list(BACKGROUNDS))
        red, green, blue = (min(255, level + random.randint(-TONE, TONE)) for level in BACKGROUNDS[background])
        things = (Thing(chosen[0], *STILL, 0),) if still else _things(chosen, num_things, random)
        scene = Scene(background, (red, green, blue), things)
        if _belongs(scene, split, chosen):
            return scene


def _belongs(scene: Scene, split: str, chosen: list[Kind]) -> bool:
    if split == "kinds":
        return True
    new_pair = any(_held_out(*pair) for pair in combinations(chosen, 2))
    if split == "combinations":
        return new_pair
    is_val = _tenth(scene.specification())  # so that no scene is in both splits, for any seeds
    return not new_pair and is_val == (split == "val")


def _things(chosen: list[Kind], num_things: int, random: Random) -> tuple[Thing, ...]:
    """Return objects with each kind at least once, sorted by kind along one axis, so that most relations are clear."""
    extra = random.choices(chosen, k=num_things - len(chosen))
    order = [kind for kind in chosen for _ in range(1 + extra.count(kind))]
    squares = _squares(num_things, random)
    axis = random.choice((0, 1))
    squares.sort(key=lambda square: square[axis])
    return tuple(
        Thing(kind, x, y, size, random.randint(-TILT, TILT)) for kind, (x, y, size) in zip(order, squares, strict=True)
    )


def _squares(num_things: int, random: Random) -> list[tuple[int, int, int]]:
    """Return squares (x, y, size) in the image that do not touch each other."""
    while True:
        squares: list[tuple[int, int, int]] = []
        for _ in range(60):
            size = random.randint(*SIZES[num_things])
            edge_distance = size // 2 + MARGIN
            x, y = (
                random.randint(edge_distance, SIDE - edge_distance),
                random.randint(edge_distance, SIDE - edge_distance),
            )
            if all(max(abs(x - u), abs(y - v)) >= (size + other) / 2 + MARGIN for u, v, other in squares):
                squares.append((x, y, size))
            if len(squares) == num_things:
                return squares


@cache
def _choices(split: str) -> tuple[str, ...]:
    return tuple(f"{article(name)} {name}" for name in names(split))


@cache
def _pool(split: str) -> tuple[Kind, ...]:
    return tuple(kind for kind in kinds() if _held_out(kind) == (split == "kinds"))


def _held_out(*members: Kind) -> bool:
    """Return whether a kind, or a pair of kinds, is held out of "train", whatever other kinds there are."""
    return _tenth(" ".join(f"{kind.code:X}" for kind in sorted(members, key=lambda kind: kind.code)))


def _tenth(text: str) -> bool:
    """Return True for about one text in ten, by a hash of the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) % 10 == 0
