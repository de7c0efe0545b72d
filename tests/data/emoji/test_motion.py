"""Test the videos of `mllm/emoji-motion`: their answers follow from the frames, and not from a single one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

import mllm
from mllm.data.emoji.image import SIDE, Scene
from mllm.data.emoji.motion import CHANGES, DIRECTIONS, emoji_motion
from mllm.data.emoji.scenes import emoji_scenes, names
from mllm.data.items import Item
from mllm.encoders.feature_store import FeatureStore
from mllm.errors import MLLMError
from mllm.media.sampling import Sampling
from mllm.media.videos import Clip, open_clip
from mllm.registry import lookup
from mllm.testing import tiny_encoder, tiny_lm

ITEMS = emoji_motion(split="train", task="both", size=1200)


def frames(item: Item) -> tuple[Scene, ...]:
    video: Any = item.images[0]
    return tuple(video.frames)


def specifications(items: list[Item]) -> list[Any]:
    return [[i.id, i.question, i.answers, [scene.specification() for scene in frames(i)]] for i in items]


def test_item_does_not_depend_on_size() -> None:
    long = specifications(emoji_motion(split="val", task="both", size=30, seed=3))
    assert specifications(emoji_motion(split="val", task="both", size=11, seed=3)) == long[:11]
    assert specifications(emoji_motion(split="val", task="both", size=11, seed=4)) != long[:11]
    assert len({item[0] for item in long}) == 30


def test_the_answer_is_what_the_frames_show() -> None:
    for item in ITEMS:
        scenes = frames(item)
        assert 4 <= len(scenes) <= 16
        places = [(scene.things[0].x, scene.things[0].y) for scene in scenes if scene.things]
        across, down = places[-1][0] - places[0][0], places[-1][1] - places[0][1]
        (shown,) = {scene.things[0].kind for scene in scenes if scene.things}
        if item.kind == "direction":
            assert len(places) == len(scenes) and len(set(places)) == len(places) and 0 in (across, down)
            expected = ("left" if across < 0 else "right") if across else ("up" if down < 0 else "down")
        else:
            assert 0 < len(places) < len(scenes) and len(set(places)) == 1
            expected = "disappears" if scenes[0].things else "appears"
        if item.question is None:
            assert expected in item.answers[0] and shown.name in item.answers[0]
        else:
            assert item.answers == (expected,) and shown.name in item.question
        sides = [(side, thing.size / 2) for scene in scenes for thing in scene.things for side in (thing.x, thing.y)]
        assert all(half <= side <= SIDE - half for side, half in sides)


def test_every_answer_is_as_frequent_and_every_length_occurs() -> None:
    asked = [item for item in ITEMS if item.question is not None]
    counts = Counter(item.answers[0] for item in asked)
    assert set(counts) == {*DIRECTIONS, *CHANGES} and min(counts.values()) > 0.7 * max(counts.values())
    assert {len(frames(item)) for item in asked} == set(range(4, 17))


def test_the_frame_in_the_middle_does_not_say_the_answer() -> None:
    """Means of the middle frame's object, by answer: the differences are those of chance, below 4 standard errors."""
    middle: dict[str, list[list[float]]] = {}
    for item in emoji_motion(split="train", size=3000):
        things = frames(item)[len(frames(item)) // 2].things
        middle.setdefault(item.answers[0], []).append([things[0].x, things[0].y] if things else [np.nan, np.nan])
    for group in (tuple(DIRECTIONS), CHANGES):
        values = {answer: np.array(middle[answer]) for answer in group}
        for one in group:
            for other in group:
                a, b = values[one], values[other]
                error = np.sqrt(np.nanvar(a, 0) / len(a) + np.nanvar(b, 0) / len(b))
                assert (np.abs(np.nanmean(a, 0) - np.nanmean(b, 0)) < 4 * error + 1e-9).all()
    visible = [np.isfinite(np.array(middle[answer])[:, 0]).mean() for answer in CHANGES]
    assert visible == pytest.approx([0.5, 0.5], abs=0.1)


def test_held_out_kinds_are_not_in_train() -> None:
    def shown(split: str) -> set[str]:
        items = emoji_motion(split=split, size=400)
        return {thing.kind.name for item in items for scene in frames(item) for thing in scene.things}

    assert shown("train") <= set(names("train")) and shown("kinds") <= set(names("kinds"))


def test_a_video_takes_tokens_by_its_frames_of_which_the_sampled_ones_are_rendered(tmp_path: Any) -> None:
    encoder = {"type": "video", "most": 6, "of": {"model": tiny_encoder(tmp_path / "encoder")}}
    lm = tiny_lm(tmp_path / "lm", context=512)
    model: Any = mllm.assemble(encoder, lm, {"type": "linear", "tokens": 4}, device="cpu")
    videos: list[Any] = [item.images[0] for item in emoji_motion(split="val", size=8)]
    counts = [model.encode([video]).visual.count(True) for video in videos]
    assert counts == [4 * min(6, len(frames(item))) for item in emoji_motion(split="val", size=8)]
    sampled = open_clip(videos[0], 2)
    first, last = (frames(emoji_motion(split="val", size=1)[0])[index] for index in indices(len(videos[0].frames)))
    assert [frame.tobytes() for frame in sampled.frames] == [first.open().tobytes(), last.open().tobytes()]
    features = FeatureStore(model)(videos)
    assert len(features) == sum(counts) // 4
    assert videos[0].open().size == (SIDE, SIDE), "a report shows a frame"


def indices(length: int) -> tuple[int, int]:
    """Return the middle frames of two halves."""
    return length // 4, 3 * length // 4


def test_frames_that_are_sources_have_the_keys_of_their_content() -> None:
    scene, other = (item.images[0] for item in emoji_scenes(split="train", size=2))
    keys = {emoji_motion(split="val", size=1)[0].images[0].key() for _ in range(2)}
    assert len(keys) == 1
    assert Clip((scene, other)).key() != Clip((other, scene)).key() == Clip((other, scene)).key()
    assert Sampling(1, None, 1, 16).of(Clip((scene, other))).tiles == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "combinations"}, "no split 'combinations'"),
        ({"split": "train", "task": "objects"}, "no task 'objects'"),
        ({"split": "train", "size": -1}, "cannot have size -1"),
    ],
)
def test_what_there_is_not_is_one_message(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MLLMError, match=message):
        lookup("readers", "emoji-motion")(**arguments)
