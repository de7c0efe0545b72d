"""Readers of captions: COCO's format and the sets that have it, Karpathy's splits, TextCaps, lines, folders."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from mllm.data.files import form, inside, json_of, present, some, text_of, texts
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.media.images import SUFFIXES, ImageFile


def coco_captions(*, annotations: str, images: str) -> list[Item]:
    """Read captions in COCO's format: one item an image, all its captions as answers. NoCaps and VizWiz have it too.

    Captions marked ``is_rejected`` or ``is_precanned`` (VizWiz) are left out; an image's ``domain`` (NoCaps) is its
    kind.

    Args:
        annotations: JSON with ``images: [{id, file_name}]`` and ``annotations: [{image_id, caption}]``.
        images: the folder with the picture files.

    Raises:
        MLLMError: the file is missing or of another form, or names pictures that are not there.
    """
    content = json_of(Path(annotations))
    expected = "images: [{id, file_name}] and annotations: [{image_id, caption}]"
    with form(f"{annotations} is not in COCO's captions format; it", expected):
        rows = {image["id"]: image for image in content["images"]}
        files = {key: inside(images, row["file_name"], annotations) for key, row in rows.items()}
        captions: dict[Any, list[str]] = defaultdict(list)
        for row in content["annotations"]:
            if not (row.get("is_rejected") or row.get("is_precanned")):
                captions[row["image_id"]] += texts(row["caption"])
    unknown = sorted(str(key) for key in captions.keys() - files.keys())
    if unknown:
        raise MLLMError(f"{annotations}: captions of images that are not listed there: {some(unknown)}.")
    items = [
        Item(str(key), (ImageFile(files[key]),), tuple(found), kind=str(rows[key].get("domain") or ""))
        for key, found in captions.items()
        if found
    ]
    return present(items, annotations)


def karpathy(*, annotations: str, images: str, split: str | list[str] = "test") -> list[Item]:
    """Read one of Karpathy's splits, of COCO or Flickr30k.

    Args:
        annotations: ``dataset_coco.json`` or ``dataset_flickr30k.json``:
            ``images: [{filename, filepath, split, sentences: [{raw}]}]``.
        images: the folder that ``filepath/filename`` is in.
        split: one or several of ``train``, ``restval``, ``val``, ``test``.

    Raises:
        MLLMError: the file is missing or of another form, or names pictures that are not there.
    """
    wanted = [split] if isinstance(split, str) else split
    content = json_of(Path(annotations))
    with form(annotations, "images: [{filename, split, sentences: [{raw}]}]"):
        items = []
        for row in content["images"]:
            if row["split"] in wanted:
                file = inside(images, str(Path(row.get("filepath", "")) / row["filename"]), annotations)
                answers = [text for sentence in row["sentences"] for text in texts(sentence["raw"])]
                name = row.get("cocoid", row.get("imgid", row["filename"]))
                items.append(Item(str(name), (ImageFile(file),), tuple(answers)))
    return present(items, f"{annotations}, split {', '.join(wanted)}")


def textcaps(*, annotations: str, images: str) -> list[Item]:
    """Read TextCaps: one item an image, all its captions as answers.

    Args:
        annotations: ``TextCaps_0.1_val.json``: ``data: [{image_id, caption_str}]``, a row a caption.
        images: the folder with ``IMAGE_ID.jpg``.

    Raises:
        MLLMError: the file is missing or of another form, or names pictures that are not there.
    """
    content = json_of(Path(annotations))
    captions: dict[str, list[str]] = defaultdict(list)
    with form(annotations, "data: [{image_id, caption_str}]"):
        for row in content["data"]:
            captions[str(row["image_id"])] += texts(row["caption_str"])
    items = [
        Item(name, (ImageFile(inside(images, f"{name}.jpg", annotations)),), tuple(found))
        for name, found in captions.items()
        if found
    ]
    return present(items, annotations)


def caption_lines(*, path: str, images: str) -> list[Item]:
    """Read lines of a caption, a tab and a picture's file, as CC3M's table has them, without a first line of names.

    Args:
        path: the TSV file. Captions of one picture become one item.
        images: the folder of the pictures.

    Raises:
        MLLMError: a line of another form, or pictures that are not there.
    """
    captions: dict[str, list[str]] = defaultdict(list)
    for number, line in enumerate(text_of(Path(path)).split("\n"), start=1):
        if not line.strip():
            continue
        caption, _, name = line.rstrip("\r").partition("\t")
        if not (caption.strip() and name.strip()) or "\t" in name:
            raise MLLMError(f"{path}, line {number} is {line[:60]!r}; expected a caption, one tab, a file.")
        captions[name.strip()].append(caption.strip())
    items = [Item(name, (ImageFile(inside(images, name, path)),), tuple(found)) for name, found in captions.items()]
    return present(items, path)


def caption_folder(*, path: str) -> list[Item]:
    """Read a folder of pictures, each with a text file of its name beside it: a caption a line. Folders inside count.

    Raises:
        MLLMError: a picture without its text file, or an empty one.
    """
    items = []
    for file in sorted(Path(path).rglob("*")):
        if file.suffix.lower() in SUFFIXES:
            beside = file.with_suffix(".txt")
            found = texts(text_of(beside).splitlines())
            if not found:
                raise MLLMError(f"{beside} is empty; expected the caption of {file.name}.")
            items.append(Item(str(file.relative_to(path)), (ImageFile(file),), tuple(found)))
    return present(items, path)
