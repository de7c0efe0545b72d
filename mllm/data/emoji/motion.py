"""Generate `mllm/emoji-motion` from a seed: videos of 4 to 16 frames in which an object moves, appears or disappears.

Only the order of the frames says which: the frame in the middle is distributed alike in all videos.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice
from random import Random

from mllm.data.emoji.image import SIDE, Scene, Thing
from mllm.data.emoji.scenes import MARGIN, random_scene
from mllm.data.emoji.text import article, phrase
from mllm.data.items import Item
from mllm.errors import MLLMError, near
from mllm.media.videos import Clip

SPLITS = ("train", "val", "kinds")
TASKS = ("captions", "questions", "both", "name")
FRAMES = (4, 16)  # of a video
SIZE = (56, 88)  # of the object, in pixels
REACH = (36, 60)  # of a path from its middle, in pixels
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
CHANGES = ("appears", "disappears")


def emoji_motion(*, split: str, task: str = "questions", size: int = 500, seed: int = 0) -> list[Item]:
    """Return ``size`` items; item i does not depend on ``size``.

    Args:
        split: "train"; "val", new videos of the same kinds; "kinds", videos of kinds that "train" never shows.
        task: "questions": which way an object moves, or whether it appears or disappears (kind "direction" or
            "change"); "captions", which say so; "both", consecutive; or "name": captions of one word, the answer.
        size: the number of items.
        seed: other seeds give other videos of the same split.

    Raises:
        MLLMError: an unknown split or task, or a negative size.
    """
    for name, value, known in (("split", split, SPLITS), ("task", task, TASKS)):
        if value not in known:
            raise MLLMError(f"emoji-motion has no {name} {value!r}. {near(value, known)}")
    if size < 0:
        raise MLLMError(f"emoji-motion cannot have size {size}: expected 0 or more. Set size to the number of items.")
    return list(islice(_items(split, task, seed), size))


def _items(split: str, task: str, seed: int) -> Iterator[Item]:
    for index in count():
        name = f"emoji-motion/{split}/{seed}/{index}"
        random = Random(name)
        scene = random_scene(split, 1, random)
        way = random.choice((*DIRECTIONS, *CHANGES))
        video = Clip(_frames(scene, way, random), name)
        if task in ("captions", "both"):
            yield Item(f"{name}/caption" if task == "both" else name, (video,), _captions(scene, way), kind=_kind(way))
        if task == "name":
            yield Item(name, (video,), (way,), kind=_kind(way))
        if task in ("questions", "both"):
            noun = scene.things[0].kind.name
            asked = f"Does the {noun} appear or disappear?" if way in CHANGES else f"Which way does the {noun} move?"
            yield Item(name, (video,), (way,), asked, _kind(way))


def _kind(way: str) -> str:
    return "change" if way in CHANGES else "direction"


def _captions(scene: Scene, way: str) -> tuple[str, ...]:
    verb = {"left": "moves to the left", "right": "moves to the right", "up": "moves up", "down": "moves down"}
    text = f"{phrase(scene.things)} {verb.get(way, way)}"
    return text, f"{text} on {article(scene.background)} {scene.background} background"


def _frames(scene: Scene, way: str, random: Random) -> tuple[Scene, ...]:
    """Return the frames: a smaller object in the middle of a path that fits into the image in any direction."""
    number, size, reach = random.randint(*FRAMES), random.randint(*SIZE), random.randint(*REACH)
    edge = size // 2 + MARGIN + reach
    x, y = random.randint(edge, SIDE - edge), random.randint(edge, SIDE - edge)
    thing = replace(scene.things[0], x=x, y=y, size=size)
    if way in CHANGES:
        visible = _visible(number, way, random)
        return tuple(replace(scene, things=(thing,) if frame in visible else ()) for frame in range(number))
    return tuple(replace(scene, things=(_moved(thing, way, reach, frame, number // 2),)) for frame in range(number))


def _moved(thing: Thing, way: str, reach: int, frame: int, middle: int) -> Thing:
    """Return the object at a frame of its path, which begins at ``-reach`` and is at 0 in the middle frame."""
    across, down = DIRECTIONS[way]
    distance = round(reach * (frame - middle) / middle)
    return replace(thing, x=thing.x + across * distance, y=thing.y + down * distance)


def _visible(number: int, way: str, random: Random) -> range:
    """Return the frames that show what appears or disappears, in half of the videos also the frame in the middle."""
    early, late = (1, number // 2), (number // 2 + 1, number - 1)
    change = random.randint(*random.choice((early, late)))
    return range(change, number) if way == "appears" else range(change)
