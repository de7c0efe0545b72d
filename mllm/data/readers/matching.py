"""Readers of what is matched rather than said: caption pairs, classes, pictures and captions to be found."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mllm.data.files import form, inside, json_lines, json_of, present
from mllm.data.items import Item
from mllm.data.readers.captions import karpathy
from mllm.errors import MLLMError
from mllm.media.images import SUFFIXES, ImageFile


def winoground(*, annotations: str, images: str) -> list[Item]:
    """Read Winoground: two pictures and two captions of the same words, to be matched; the kind is ``collapsed_tag``.

    Args:
        annotations: ``examples.jsonl``, lines of ``{id, image_0, image_1, caption_0, caption_1, collapsed_tag}``.
        images: the folder with ``IMAGE_0.png``.
    """
    items = []
    with form(annotations, "lines of {id, image_0, image_1, caption_0, caption_1}"):
        for row in json_lines(Path(annotations)):
            files = [f"{Path(row[key]).stem}.png" for key in ("image_0", "image_1")]
            pictures = tuple(ImageFile(inside(images, file, annotations)) for file in files)
            captions = (str(row["caption_0"]), str(row["caption_1"]))
            kind = str(row.get("collapsed_tag", ""))
            items.append(Item(str(row["id"]), pictures, ("text", "image", "group"), kind=kind, choices=captions))
    return present(items, annotations)


def sugarcrepe(*, annotations: str, images: str) -> list[Item]:
    """Read SugarCrepe: which of two captions is a picture's; the kind is the file (``add_att``, ``swap_obj``, ...).

    Args:
        annotations: the folder of files ``{number: {filename, caption, negative_caption}}``.
        images: COCO's pictures ``val2017``.
    """
    items = []
    for file in sorted(Path(annotations).glob("*.json")):
        content = json_of(file)
        with form(file, "{number: {filename, caption, negative_caption}}"):
            for key, row in content.items():
                picture = ImageFile(inside(images, row["filename"], file))
                both = (str(row["caption"]), str(row["negative_caption"]))
                items.append(Item(f"{file.stem}/{key}", (picture,), both[:1], kind=file.stem, choices=both))
    return present(items, annotations)


def classes(*, path: str) -> list[Item]:
    """Read a folder with a folder of pictures for each class, named as the class is; "_" stands for a blank.

    An item's choices are all classes, so a suite can choose among them.
    """
    folders = sorted(place for place in Path(path).glob("*") if place.is_dir())
    if not folders:
        raise MLLMError(f"{path} holds no folders; expected one for each class, with its pictures.")
    names = tuple(folder.name.replace("_", " ") for folder in folders)
    items = [
        Item(f"{folder.name}/{file.name}", (ImageFile(file),), (name,), kind=name, choices=names)
        for folder, name in zip(folders, names, strict=True)
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in SUFFIXES
    ]
    return present(items, path)


def karpathy_retrieval(
    *, annotations: str, images: str, find: Literal["texts", "images"], split: str = "test"
) -> list[Item]:
    """Read one of Karpathy's splits for retrieval: a picture's captions, or a caption's picture, among all.

    An answer is a place, counted from 0, among the item's choices (``texts``) or images (``images``).
    """
    sources = karpathy(annotations=annotations, images=images, split=split)
    texts = tuple(text for item in sources for text in item.answers)
    pictures = tuple(image for item in sources for image in item.images)
    items, place = [], 0
    for number, item in enumerate(sources):
        places = range(place, place + len(item.answers))
        place += len(item.answers)
        if find == "texts":
            items.append(Item(item.id, item.images, tuple(map(str, places)), choices=texts))
        else:
            items += [Item(f"{item.id}/{p}", pictures, (str(number),), question=texts[p]) for p in places]
    return items
