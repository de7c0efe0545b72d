import unicodedata
from pathlib import Path

import numpy as np
import pytest

from mllm.data.emoji import image as scene_image
from mllm.data.emoji.image import SIDE, Scene, glyph, kinds, render
from mllm.data.emoji.scenes import emoji_scenes
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.hub.embedded import locate

try:
    locate("mllm/openmoji")
    INSTALLED = True
except MLLMError:
    INSTALLED = False
needs_font = pytest.mark.skipif(
    not INSTALLED, reason="mllm/openmoji is not installed: `mllm parts install mllm/openmoji`"
)


def scene(item: Item) -> Scene:
    source = item.images[0]
    assert isinstance(source, Scene)
    return source


def test_table_has_enough_kinds_with_distinct_names_and_plurals() -> None:
    assert len(kinds()) >= 300
    for values in ([k.name for k in kinds()], [k.plural for k in kinds()], [k.code for k in kinds()]):
        assert len(values) == len(set(values))


def test_names_are_those_of_unicode() -> None:
    known = 0
    for kind in kinds():
        official = unicodedata.name(chr(kind.code), "").lower().replace("-", " ").replace("womans", "woman")
        thing = kind.name.partition(" of ")[2] or kind.name
        for word in thing.replace("-", " ").replace("'s", "").split() if official else ():
            assert word[:4] in official, f"{kind.name!r} is called {official!r}"
        known += bool(official)
    assert known >= 300  # names younger than this Python's table are not looked up


@pytest.mark.parametrize(
    ("name", "plural"),
    [
        ("red apple", "red apples"),
        ("mouse", "mice"),
        ("sheep", "sheep"),
        ("wolf", "wolves"),
        ("strawberry", "strawberries"),
        ("key", "keys"),
        ("sandwich", "sandwiches"),
        ("pair of scissors", "pairs of scissors"),
        ("box of popcorn", "boxes of popcorn"),
        ("loaf of bread", "loaves of bread"),
        ("woman's hat", "women's hats"),
        ("snowman", "snowmen"),
        ("tooth", "teeth"),
        ("bow and arrow", "bows and arrows"),
    ],
)
def test_plurals(name: str, plural: str) -> None:
    assert {kind.name: kind.plural for kind in kinds()}[name] == plural


@needs_font
def test_every_kind_is_rendered_completely_and_in_colour() -> None:
    for kind in kinds():
        image = np.asarray(glyph(kind.code))  # (H, W, 4), cropped to the visible pixels
        assert max(image.shape[:2]) < 1.75 * scene_image.GLYPH, f"{kind.name} reaches the canvas's edge"
        visible = image[image[..., 3] > 128]
        assert len(visible) > 0.1 * image[..., 3].size, f"{kind.name} is nearly empty"
        assert np.ptp(visible[:, :3], axis=0).max() > 50, f"{kind.name} has one colour only"


@needs_font
def test_pixels_follow_the_specification() -> None:
    for item in emoji_scenes(split="train", size=20):
        source = scene(item)
        pixels = np.asarray(render(source)).astype(int)  # (224, 224, 3)
        assert pixels.shape == (SIDE, SIDE, 3)
        empty = np.ones((SIDE, SIDE), dtype=bool)
        for thing in source.things:
            half = thing.size // 2 + 1
            square = np.s_[thing.y - half : thing.y + half, thing.x - half : thing.x + half]
            empty[square] = False
            assert (pixels[square] != source.colour).any(axis=-1).mean() > 0.05
        assert (pixels[empty] == source.colour).all()


@needs_font
def test_images_are_cached_and_read_back_identically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scene_image, "cache_dir", lambda: tmp_path)
    first, second = (scene(item) for item in emoji_scenes(split="train", size=2))
    rendered = first.open()
    (cached,) = (tmp_path / "scenes").rglob("*.*")
    assert cached == tmp_path / "scenes" / first.key()[:2] / f"{first.key()}.png"
    monkeypatch.setattr(scene_image, "render", lambda scene: pytest.fail("rendered again"))
    assert first.open().mode == "RGB"
    assert first.open().tobytes() == rendered.tobytes() == render(first).tobytes()
    assert first.key() != second.key()
