"""Read data for matching images and texts: caption pairs, classes, and images and captions for retrieval."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from mllm.data.files import entries_of, files_in, images_in, inside, records_of, visible_in
from mllm.data.items import Item
from mllm.data.readers.captions import karpathy_items
from mllm.data.reading import Reading, reader
from mllm.data.values import identifier, text_in
from mllm.errors import MLLMError
from mllm.media.images import ImageFile

_WINOGROUND = "lines of {id, image_0, image_1, caption_0, caption_1}"
_SUGARCREPE = "{number: {filename, caption, negative_caption}}"


@reader
def winoground(rows: Reading, *, annotations: str, images: str) -> list[Item]:
    """Read Winoground: two images and two captions of the same words to match; the kind is ``collapsed_tag``.

    Args:
        rows: the reading.
        annotations: ``examples.jsonl``, lines of ``{id, image_0, image_1, caption_0, caption_1, collapsed_tag}``.
        images: the folder of the image files ``IMAGE_0.png``.
    """

    def item_of(row: Any, number: int) -> Item:
        files = [f"{Path(row[key]).stem}.png" for key in ("image_0", "image_1")]
        pair = tuple(ImageFile(inside(images, file)) for file in files)
        captions = (text_in(row["caption_0"], "caption_0"), text_in(row["caption_1"], "caption_1"))
        kind = str(row.get("collapsed_tag", ""))
        return Item(identifier(row["id"]), pair, ("text", "image", "group"), kind=kind, choices=captions)

    return rows.each(records_of(Path(annotations)), item_of, _WINOGROUND)


@reader
def sugarcrepe(rows: Reading, *, annotations: str, images: str) -> list[Item]:
    """Read SugarCrepe: an image with a right and a wrong caption; the kind is the file's name (``add_att``, ...).

    Args:
        rows: the reading.
        annotations: the folder of JSON files ``{number: {filename, caption, negative_caption}}``.
        images: the folder of COCO's ``val2017`` images.
    """

    def item_of(entry: tuple[str, Any], number: int) -> Item:
        key, row = entry
        image = ImageFile(inside(images, row["filename"]))
        both = (text_in(row["caption"], "caption"), text_in(row["negative_caption"], "negative_caption"))
        return Item(f"{file.stem}/{key}", (image,), both[:1], kind=file.stem, choices=both)

    items = []
    for file in files_in(Path(annotations), ".json"):
        items += rows.each(entries_of(file, _SUGARCREPE), item_of, _SUGARCREPE)
    return items


@reader
def classes(rows: Reading, *, path: str) -> list[Item]:
    """Read an image folder: a subfolder of images per class, with the class's name ("_" for a space).

    An item's choices are all classes, so that a suite can choose among them.
    """
    folders = [folder for folder in visible_in(Path(path)) if folder.is_dir()]
    if not folders:
        raise MLLMError(
            f"{path} contains no folders; expected one per class, with its images. Move the images to such folders."
        )
    names = tuple(folder.name.replace("_", " ") for folder in folders)
    return [
        Item(f"{folder.name}/{file.name}", (ImageFile(file),), (name,), kind=name, choices=names)
        for folder, name in zip(folders, names, strict=True)
        for file in images_in(folder)
    ]


@reader
def karpathy_retrieval(
    rows: Reading, *, annotations: str, images: str, find: Literal["texts", "images"], split: str = "test"
) -> list[Item]:
    """Read one of Karpathy's splits for retrieval: the captions of an image, or the image of a caption, among all.

    An answer is an index, counted from 0, into the item's choices (``find="texts"``) or images (``find="images"``).
    """
    sources = rows.present(karpathy_items(rows, annotations, images, [split]))
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
