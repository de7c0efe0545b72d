"""Read data for matching images and texts: caption pairs, classes, and images and captions for retrieval."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mllm.data.files import check_present, expect_form, inside, json_lines, json_of
from mllm.data.items import Item
from mllm.data.readers.captions import karpathy
from mllm.errors import MLLMError
from mllm.media.images import SUFFIXES, ImageFile


def winoground(*, annotations: str, images: str) -> list[Item]:
    """Read Winoground: two images and two captions of the same words to match; the kind is ``collapsed_tag``.

    Args:
        annotations: ``examples.jsonl``, lines of ``{id, image_0, image_1, caption_0, caption_1, collapsed_tag}``.
        images: the folder of the image files ``IMAGE_0.png``.
    """
    items = []
    with expect_form(annotations, "lines of {id, image_0, image_1, caption_0, caption_1}"):
        for row in json_lines(Path(annotations)):
            files = [f"{Path(row[key]).stem}.png" for key in ("image_0", "image_1")]
            pair = tuple(ImageFile(inside(images, file, annotations)) for file in files)
            captions = (str(row["caption_0"]), str(row["caption_1"]))
            kind = str(row.get("collapsed_tag", ""))
            items.append(Item(str(row["id"]), pair, ("text", "image", "group"), kind=kind, choices=captions))
    return check_present(items, annotations)


def sugarcrepe(*, annotations: str, images: str) -> list[Item]:
    """Read SugarCrepe: an image with a right and a wrong caption; the kind is the file's name (``add_att``, ...).

    Args:
        annotations: the folder of JSON files ``{number: {filename, caption, negative_caption}}``.
        images: the folder of COCO's ``val2017`` images.
    """
    items = []
    for file in sorted(Path(annotations).glob("*.json")):
        content = json_of(file)
        with expect_form(file, "{number: {filename, caption, negative_caption}}"):
            for key, row in content.items():
                image = ImageFile(inside(images, row["filename"], file))
                both = (str(row["caption"]), str(row["negative_caption"]))
                items.append(Item(f"{file.stem}/{key}", (image,), both[:1], kind=file.stem, choices=both))
    return check_present(items, annotations)


def classes(*, path: str) -> list[Item]:
    """Read an image folder: a subfolder of images per class, with the class's name ("_" for a space).

    An item's choices are all classes, so that a suite can choose among them.
    """
    folders = sorted(folder for folder in Path(path).glob("*") if folder.is_dir())
    if not folders:
        raise MLLMError(
            f"{path} contains no folders; expected one per class, with its images. Move the images to such folders."
        )
    names = tuple(folder.name.replace("_", " ") for folder in folders)
    items = [
        Item(f"{folder.name}/{file.name}", (ImageFile(file),), (name,), kind=name, choices=names)
        for folder, name in zip(folders, names, strict=True)
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in SUFFIXES
    ]
    return check_present(items, path)


def karpathy_retrieval(
    *, annotations: str, images: str, find: Literal["texts", "images"], split: str = "test"
) -> list[Item]:
    """Read one of Karpathy's splits for retrieval: the captions of an image, or the image of a caption, among all.

    An answer is an index, counted from 0, into the item's choices (``find="texts"``) or images (``find="images"``).
    """
    sources = karpathy(annotations=annotations, images=images, split=split)
    texts = tuple(text for item in sources for text in item.answers)
    candidates = tuple(image for item in sources for image in item.images)
    items, start = [], 0
    for number, item in enumerate(sources):
        indices = range(start, start + len(item.answers))
        start += len(item.answers)
        if find == "texts":
            items.append(Item(item.id, item.images, tuple(map(str, indices)), choices=texts))
        else:
            items += [Item(f"{item.id}/{i}", candidates, (str(number),), question=texts[i]) for i in indices]
    return items
