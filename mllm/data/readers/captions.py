"""Read captions: COCO's format (also NoCaps, VizWiz), Karpathy's splits, TextCaps, TSV files and folders."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from mllm.data.files import check_present, expect_form, inside, json_of, some, text_of, texts
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.media.images import SUFFIXES, ImageFile


def coco_captions(*, annotations: str, images: str) -> list[Item]:
    """Read captions in COCO's format, which NoCaps and VizWiz also use: an item per image, all captions as answers.

    Captions marked ``is_rejected`` or ``is_precanned`` (VizWiz) are left out; an image's ``domain`` (NoCaps) is the
    item's kind.

    Args:
        annotations: JSON with ``images: [{id, file_name}]`` and ``annotations: [{image_id, caption}]``.
        images: the folder of the image files.

    Raises:
        MLLMError: the file is missing or has an unexpected form, or image files are missing.
    """
    content = json_of(Path(annotations))
    expected = "images: [{id, file_name}] and annotations: [{image_id, caption}]"
    with expect_form(f"{annotations} is not in COCO's captions format; it", expected):
        rows = {image["id"]: image for image in content["images"]}
        files = {key: inside(images, row["file_name"], annotations) for key, row in rows.items()}
        captions: dict[Any, list[str]] = defaultdict(list)
        for row in content["annotations"]:
            if not (row.get("is_rejected") or row.get("is_precanned")):
                captions[row["image_id"]] += texts(row["caption"])
    unknown = sorted(str(key) for key in captions.keys() - files.keys())
    if unknown:
        raise MLLMError(
            f"{annotations}: captions of images that are not listed in it: {some(unknown)}. List the images, or remove "
            "their captions."
        )
    items = [
        Item(str(key), (ImageFile(files[key]),), tuple(answers), kind=str(rows[key].get("domain") or ""))
        for key, answers in captions.items()
        if answers
    ]
    return check_present(items, annotations)


def karpathy(*, annotations: str, images: str, split: str | list[str] = "test") -> list[Item]:
    """Read one of Karpathy's splits, of COCO or Flickr30k.

    Args:
        annotations: ``dataset_coco.json`` or ``dataset_flickr30k.json``:
            ``images: [{filename, filepath, split, sentences: [{raw}]}]``.
        images: the folder that contains ``filepath/filename``.
        split: one or more of ``train``, ``restval``, ``val``, ``test``.

    Raises:
        MLLMError: the file is missing or has an unexpected form, or image files are missing.
    """
    splits = [split] if isinstance(split, str) else split
    content = json_of(Path(annotations))
    with expect_form(annotations, "images: [{filename, split, sentences: [{raw}]}]"):
        items = []
        for row in content["images"]:
            if row["split"] in splits:
                file = inside(images, str(Path(row.get("filepath", "")) / row["filename"]), annotations)
                answers = [text for sentence in row["sentences"] for text in texts(sentence["raw"])]
                name = row.get("cocoid", row.get("imgid", row["filename"]))
                items.append(Item(str(name), (ImageFile(file),), tuple(answers)))
    return check_present(items, f"{annotations}, split {', '.join(splits)}")


def textcaps(*, annotations: str, images: str) -> list[Item]:
    """Read TextCaps: an item per image, with all captions as answers.

    Args:
        annotations: ``TextCaps_0.1_val.json``: ``data: [{image_id, caption_str}]``, a row per caption.
        images: the folder of the image files ``IMAGE_ID.jpg``.

    Raises:
        MLLMError: the file is missing or has an unexpected form, or image files are missing.
    """
    content = json_of(Path(annotations))
    captions: dict[str, list[str]] = defaultdict(list)
    with expect_form(annotations, "data: [{image_id, caption_str}]"):
        for row in content["data"]:
            captions[str(row["image_id"])] += texts(row["caption_str"])
    items = [
        Item(name, (ImageFile(inside(images, f"{name}.jpg", annotations)),), tuple(answers))
        for name, answers in captions.items()
        if answers
    ]
    return check_present(items, annotations)


def caption_lines(*, path: str, images: str) -> list[Item]:
    """Read a TSV file of captions and image files without a header, as CC3M's: an item per image.

    Args:
        path: the TSV file, with lines of a caption, a tab and an image file. The captions of an image are its answers.
        images: the folder of the image files.

    Raises:
        MLLMError: a line has an unexpected form, or image files are missing.
    """
    captions: dict[str, list[str]] = defaultdict(list)
    for number, line in enumerate(text_of(Path(path)).split("\n"), start=1):
        if not line.strip():
            continue
        caption, _, name = line.rstrip("\r").partition("\t")
        if not (caption.strip() and name.strip()) or "\t" in name:
            raise MLLMError(
                f"{path}, line {number} is {line[:60]!r}; expected a caption, one tab, a file. Correct the line."
            )
        captions[name.strip()].append(caption.strip())
    items = [Item(name, (ImageFile(inside(images, name, path)),), tuple(answers)) for name, answers in captions.items()]
    return check_present(items, path)


def caption_folder(*, path: str) -> list[Item]:
    """Read a folder of images (and its subfolders), each with a text file of the same name with a caption per line.

    Raises:
        MLLMError: an image has no text file, or an empty one.
    """
    items = []
    for file in sorted(Path(path).rglob("*")):
        if file.suffix.lower() in SUFFIXES:
            text_file = file.with_suffix(".txt")
            captions = texts(text_of(text_file).splitlines())
            if not captions:
                raise MLLMError(
                    f"{text_file} is empty; expected the captions of {file.name}. Write them, one per line."
                )
            items.append(Item(str(file.relative_to(path)), (ImageFile(file),), tuple(captions)))
    return check_present(items, path)
