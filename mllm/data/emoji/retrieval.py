"""Scenes of `mllm/emoji-scenes` to be found by what is said of them, and what is said by the scenes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal, cast

from mllm.data.emoji.image import Scene
from mllm.data.emoji.scenes import emoji_scenes
from mllm.data.emoji.text import groups, phrase
from mllm.data.items import Item
from mllm.errors import MLLMError

DRAWN = 4  # scenes for each that is wanted: some say the same as another


def emoji_retrieval(
    *,
    find: Literal["images", "texts", "both"] = "both",
    told: Sequence[Literal["object", "objects", "scene"]] = ("scene",),
    split: str = "val",
    size: int = 150,
    seed: int = 1,
) -> list[Item]:
    """Return captions whose scene is to be found among all ``size``, and scenes whose caption is.

    No two scenes show the same things before the same background. An answer is a place, counted from 0, among the
    item's images or choices.

    Args:
        find: "images", kind "text to image"; "texts", kind "image to text"; or both, one behind the other.
        told: what a text says: "object", one kind of the scene's things; "objects", all; "scene", the background too.
            Of several the items follow each other, and the kind says which.
        split: see `mllm.data.emoji.scenes.emoji_scenes`.
        size: scenes.
        seed: of the scenes.

    Raises:
        MLLMError: an unknown value, or fewer scenes that differ.
    """
    if wrong := {find} - {"images", "texts", "both"} or set(told) - {"object", "objects", "scene"}:
        raise MLLMError(f"emoji-retrieval cannot find, or be told, {wrong.pop()!r}: see find and told.")
    different: dict[Any, Item] = {}
    for item in emoji_scenes(split=split, size=DRAWN * size, seed=seed):
        different.setdefault(_content(cast(Scene, item.images[0])), item)
    scenes = list(different.values())[:size]
    if len(scenes) < size:
        raise MLLMError(f"emoji-retrieval: {size} scenes are wanted, and {len(scenes)} of those drawn differ.")
    pictures = tuple(scene.images[0] for scene in scenes)
    items: list[Item] = []
    for much in told:
        texts = tuple(_text(scene, much) for scene in scenes)
        more = f", {much} told" if len(told) > 1 else ""
        to_image = [
            Item(f"{scene.id}/image/{much}", pictures, (str(place),), question=text, kind=f"text to image{more}")
            for place, (scene, text) in enumerate(zip(scenes, texts, strict=True))
        ]
        to_text = [
            Item(f"{scene.id}/text/{much}", scene.images, (str(place),), kind=f"image to text{more}", choices=texts)
            for place, scene in enumerate(scenes)
        ]
        items += chain(*{"images": [to_image], "texts": [to_text], "both": [to_image, to_text]}[find])
    return items


def _content(scene: Scene) -> tuple[str, tuple[str, ...]]:
    return scene.background, tuple(sorted(phrase(group) for group in groups(scene)))


def _text(item: Item, much: str) -> str:
    """Return the caption that says so much; see `mllm.data.emoji.text.captions` for the order."""
    if much == "object":
        return phrase(groups(cast(Scene, item.images[0]))[0])
    return item.answers[-3] if much == "objects" else item.answers[-2]
