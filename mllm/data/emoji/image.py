"""Render the scenes of `mllm/emoji-scenes` from their specifications: kind, position, size and angle of each object.

The data set contains no pixels. A scene is a short specification, which ``Scene.open`` renders with OpenMoji's font.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mllm.hub.embedded import locate
from mllm.system import cache_dir

VERSION = 1  # increased when the same specification gives other pixels
SIDE = 224  # pixels
GLYPH = 128  # font size at which every glyph is rendered once; about the size of the largest objects
BACKGROUNDS = {
    "white": (250, 250, 250),
    "grey": (168, 168, 168),
    "yellow": (252, 226, 110),
    "orange": (246, 158, 66),
    "pink": (250, 178, 206),
    "purple": (160, 112, 204),
    "blue": (104, 164, 234),
    "green": (112, 196, 116),
}


@dataclass(frozen=True)
class Kind:
    """A kind of object: a row of kinds.tsv."""

    code: int  # Unicode code point
    name: str  # singular, without article
    plural: str
    labels: frozenset[str]  # its category, and traits such as "flies", "maybe-flies" (opinions differ), "generic"


@dataclass(frozen=True)
class Thing:
    """An object of a scene, in a square of ``size`` pixels centred at ``(x, y)`` that no other object touches."""

    kind: Kind
    x: int  # pixels from the left
    y: int  # pixels from the top
    size: int  # pixels
    angle: int  # degrees, counterclockwise


@dataclass(frozen=True)
class Scene:
    """An image source (``mllm.media.images.ImageSource``): up to four objects on a plain background, 224 x 224, RGB.

    It is rendered lazily and cached as PNG in ``<cache>/scenes/``: one core renders about 330 scenes per second, and
    reads three to six times as many.
    """

    background: str  # a name in BACKGROUNDS
    colour: tuple[int, int, int]  # the exact RGB value, a shade of the background
    things: tuple[Thing, ...]

    def open(self) -> Image.Image:
        """Return the RGB image; equal scenes give equal pixels."""
        key = self.key()
        path = cache_dir() / "scenes" / key[:2] / f"{key}.png"
        try:
            with Image.open(path) as cached:
                return cached.convert("RGB")
        except FileNotFoundError:
            image = render(self)
            with suppress(OSError):  # without a writable cache, scenes are rendered each time
                _write(image, path)
            return image

    def key(self) -> str:
        """Return a hash of the specification, the renderer's version and the font."""
        return hashlib.sha256(f"{VERSION} {_font_hash()} {self.specification()}".encode()).hexdigest()

    def specification(self) -> str:
        """Return everything that determines the pixels, as JSON."""
        things = [[thing.kind.code, thing.x, thing.y, thing.size, thing.angle] for thing in self.things]
        return json.dumps([self.colour, things])


@cache
def kinds() -> tuple[Kind, ...]:
    """Return every kind of object, ordered by code point."""
    table = files("mllm.data.emoji").joinpath("kinds.tsv").read_text(encoding="utf-8")
    return tuple(
        Kind(
            code=int(row["code"], 16),
            name=row["name"],
            plural=row["plural"] or regular_plural(row["name"]),
            labels=frozenset([row["category"], *row["traits"].split()]),
        )
        for row in csv.DictReader(table.splitlines(), delimiter="\t")
    )


def regular_plural(name: str) -> str:
    """Return the regular plural: "box of popcorn" -> "boxes of popcorn", "strawberry" -> "strawberries"."""
    head, of, rest = name.partition(" of ")
    if head.endswith(("s", "x", "z", "ch", "sh")):
        head += "es"
    elif head.endswith("y") and head[-2] not in "aeiou":
        head = head[:-1] + "ies"
    else:
        head += "s"
    return head + of + rest


def render(scene: Scene) -> Image.Image:
    """Return a newly rendered scene, 224 x 224 RGB."""
    image = Image.new("RGB", (SIDE, SIDE), scene.colour)
    for thing in scene.things:
        rotated = _crop(glyph(thing.kind.code).rotate(thing.angle, Image.Resampling.BICUBIC, expand=True))
        scale = thing.size / max(rotated.size)
        size = (max(1, round(rotated.width * scale)), max(1, round(rotated.height * scale)))
        small = rotated.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
        image.paste(small, (thing.x - size[0] // 2, thing.y - size[1] // 2), small)
    return image


@lru_cache(maxsize=1024)
def glyph(code: int) -> Image.Image:
    """Return a large RGBA image of one code point, cropped to its visible pixels."""
    canvas = Image.new("RGBA", (2 * GLYPH, 2 * GLYPH))
    ImageDraw.Draw(canvas).text((GLYPH // 2, GLYPH // 4), chr(code), font=_font(), embedded_color=True)
    return _crop(canvas)


def _crop(image: Image.Image) -> Image.Image:
    box = image.getchannel("A").getbbox()
    assert box, "the glyph is empty"
    return image.crop(box)


def _font_path() -> Path:
    return locate("mllm/openmoji") / "font" / "glyf_colr0.ttf"


@cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_font_path(), GLYPH, layout_engine=ImageFont.Layout.BASIC)


@cache
def _font_hash() -> str:
    return hashlib.sha256(_font_path().read_bytes()).hexdigest()


def _write(image: Image.Image, path: Path) -> None:
    """Write atomically: other processes see the complete file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(suffix=".part", dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        image.save(file, "PNG", compress_level=1)
    Path(temporary).replace(path)
