"""Read `mllm/emoji-scenes` for image-text retrieval: scenes by their captions, and captions by their scenes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal, cast

from mllm.data.emoji.image import Scene
from mllm.data.emoji.scenes import emoji_scenes
from mllm.data.emoji.text import groups, phrase
from mllm.data.items import Item
from mllm.errors import MLLMError

OVERSAMPLING = 4  # scenes generated per scene returned, since some have the same content


def emoji_retrieval(
    *,
    find: Literal["images", "texts", "both"] = "both",
    told: Sequence[Literal["object", "objects", "scene"]] = ("scene",),
    split: str = "val",
    size: int = 150,
    seed: int = 1,
) -> list[Item]:
    """Return retrieval items: captions as queries for one of ``size`` scenes, and scenes as queries for a caption.

    No two scenes show the same objects on the same background. An answer is an index, counted from 0, into the item's
    images or choices.

    Args:
        find: what is retrieved: "images" (kind "text to image"), "texts" (kind "image to text"), or "both".
        told: the content of a text: "object", one kind of the scene's objects; "objects", all of them; "scene", the
            background too. With several values, the items follow each other, and their kind names the value.
        split: see `mllm.data.emoji.scenes.emoji_scenes`.
        size: the number of scenes.
        seed: the seed of the scenes.

    Raises:
        MLLMError: an unknown value, or fewer than ``size`` distinct scenes.
    """
    if wrong := {find} - {"images", "texts", "both"} or set(told) - {"object", "objects", "scene"}:
        raise MLLMError(
            f"emoji-retrieval does not support {wrong.pop()!r}: expected find: images, texts or both, and told: "
            "object, objects or scene. Set find and told to these."
        )
    distinct: dict[Any, Item] = {}
    for item in emoji_scenes(split=split, size=OVERSAMPLING * size, seed=seed):
        distinct.setdefault(_content(cast(Scene, item.images[0])), item)
    scenes = list(distinct.values())[:size]
    if len(scenes) < size:
        raise MLLMError(
            f"emoji-retrieval: size is {size}, but only {len(scenes)} of the generated scenes are distinct. Set a "
            "smaller size."
        )
    images = tuple(scene.images[0] for scene in scenes)
    items: list[Item] = []
    for content in told:
        texts = tuple(_text(scene, content) for scene in scenes)
        suffix = f", {content} told" if len(told) > 1 else ""
        to_image = [
            Item(f"{scene.id}/image/{content}", images, (str(index),), question=text, kind=f"text to image{suffix}")
            for index, (scene, text) in enumerate(zip(scenes, texts, strict=True))
        ]
        to_text = [
            Item(
                f"{scene.id}/text/{content}", scene.images, (str(index),), kind=f"image to text{suffix}", choices=texts
            )
            for index, scene in enumerate(scenes)
        ]
        items += chain(*{"images": [to_image], "texts": [to_text], "both": [to_image, to_text]}[find])
    return items


def _content(scene: Scene) -> tuple[str, tuple[str, ...]]:
    return scene.background, tuple(sorted(phrase(group) for group in groups(scene)))


def _text(item: Item, content: str) -> str:
    """Return the caption with a content; see `mllm.data.emoji.text.captions` for their order."""
    if content == "object":
        return phrase(groups(cast(Scene, item.images[0]))[0])
    return item.answers[-3] if content == "objects" else item.answers[-2]
