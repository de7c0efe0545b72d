"""Read captions: COCO's format (also NoCaps, VizWiz), Karpathy's splits, TextCaps, TSV files and folders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mllm.data.files import images_in, inside, lines_of, rows_of, text_of, visible_in
from mllm.data.items import Item
from mllm.data.reading import Reading, reader
from mllm.data.records import Record
from mllm.data.values import identifier, text_in
from mllm.errors import MLLMError, near
from mllm.media.images import ImageFile

_COCO = "images: [{id, file_name}] and annotations: [{image_id, caption}]"
_KARPATHY = "images: [{filename, split, sentences: [{raw}]}]"
_TEXTCAPS = "data: [{image_id, caption_str}]"
_LINE = "a caption, one tab, a file"

Captioned = tuple[str, Path, list[str]]  # an image's name, its file and captions


@reader
def coco_captions(rows: Reading, *, annotations: str, images: str) -> Sequence[Item]:
    """Read captions in COCO's format, which NoCaps and VizWiz also use: an item per image, all captions as answers.

    Captions marked ``is_rejected`` or ``is_precanned`` (VizWiz) are left out; an image's ``domain`` (NoCaps) is the
    item's kind.

    Args:
        rows: the reading.
        annotations: JSON with ``images: [{id, file_name}]`` and ``annotations: [{image_id, caption}]``.
        images: the folder of the image files.

    Raises:
        MLLMError: the file is missing or has an unexpected form, or image files are missing.
    """

    def image_of(row: Any, number: int) -> tuple[str, tuple[Any, str]]:
        return identifier(row["id"]), (row["file_name"], str(row.get("domain") or ""))

    pairs = rows.each(rows_of(annotations, _COCO, "images"), image_of, _COCO)
    files = rows.by_id(pairs, f"{annotations}: the image id", repeats=True)

    def captions_of(row: Any, number: int) -> tuple[str, list[str]] | None:
        key = identifier(row["image_id"])
        if key not in files:
            raise MLLMError(f"its image {key} is not listed in 'images'. List the image, or remove the caption.")
        rejected = row.get("is_rejected") or row.get("is_precanned")
        return None if rejected else (key, rows.captions(row["caption"]))

    def item_of(group: tuple[str, list[list[str]]], number: int) -> Item | None:
        key, captions = group
        if (file := files[key]) is None:  # counted above
            return None
        return Item(key, (ImageFile(inside(images, file[0])),), _some_of(captions), kind=file[1])

    listed = rows_of(annotations, _COCO, "annotations")
    groups = rows.groups(listed, captions_of, _COCO, lambda key: f"{annotations}, image {key}")
    return rows.items(groups, item_of, _COCO, count=False)


@reader
def karpathy(rows: Reading, *, annotations: str, images: str, split: str | list[str] = "test") -> Sequence[Item]:
    """Read one of Karpathy's splits, of COCO or Flickr30k.

    Args:
        rows: the reading.
        annotations: ``dataset_coco.json`` or ``dataset_flickr30k.json``:
            ``images: [{filename, filepath, split, sentences: [{raw}]}]``.
        images: the folder that contains ``filepath/filename``.
        split: one or more of ``train``, ``restval``, ``val``, ``test``.

    Raises:
        MLLMError: the file is missing or has an unexpected form, has no such split, or image files are missing.
    """
    return karpathy_items(rows, annotations, images, [split] if isinstance(split, str) else split)


def karpathy_items(rows: Reading, annotations: str, images: str, splits: list[str]) -> Sequence[Item]:
    """Return the items of some of Karpathy's splits."""
    known: dict[str, None] = {}

    def item_of(row: Any, number: int) -> Item | None:
        known[text_in(row["split"], "split")] = None
        if row["split"] not in splits:
            return None
        file = inside(images, str(Path(row.get("filepath", "")) / row["filename"]))
        answers = [text for sentence in row["sentences"] for text in rows.captions(sentence["raw"])]
        name = identifier(row.get("cocoid", row.get("imgid", row["filename"])))
        return Item(name, (ImageFile(file),), _some_of([answers]))

    items = rows.items(rows_of(annotations, _KARPATHY, "images"), item_of, _KARPATHY)
    check_splits(splits, known, annotations)
    return items


def check_splits(splits: Iterable[str], known: Iterable[str], file: str) -> None:
    """Check that a file has rows of every split that is asked for.

    Raises:
        MLLMError: it has none of one of them.
    """
    for split in splits:
        if split not in known:
            raise MLLMError(f"{file} has no split {split!r}. {near(str(split), known)}")


@reader
def textcaps(rows: Reading, *, annotations: str, images: str) -> Sequence[Item]:
    """Read TextCaps: an item per image, with all captions as answers.

    Args:
        rows: the reading.
        annotations: ``TextCaps_0.1_val.json``: ``data: [{image_id, caption_str}]``, a row per caption.
        images: the folder of the image files ``IMAGE_ID.jpg``.

    Raises:
        MLLMError: the file is missing or has an unexpected form, or image files are missing.
    """

    def caption_of(row: Any, number: int) -> Captioned:
        key = identifier(row["image_id"])
        return key, inside(images, f"{key}.jpg"), rows.captions(row["caption_str"])

    return grouped(rows, rows_of(annotations, _TEXTCAPS, "data"), caption_of, _TEXTCAPS, annotations)


@reader
def caption_lines(rows: Reading, *, path: str, images: str) -> Sequence[Item]:
    """Read a TSV file of captions and image files without a header, as CC3M's: an item per image.

    A quotation mark is a character like any other.

    Args:
        rows: the reading.
        path: the TSV file, with lines of a caption, a tab and an image file. The captions of an image are its answers.
        images: the folder of the image files.

    Raises:
        MLLMError: a line has an unexpected form, or image files are missing.
    """

    def caption_of(line: str, number: int) -> Captioned:
        caption, _, name = line.rstrip("\r").partition("\t")
        if not (caption.strip() and name.strip()) or "\t" in name:
            raise MLLMError(f"it is {line[:60]!r}; expected {_LINE}. Correct the line.")
        return name.strip(), inside(images, name.strip()), rows.captions(caption)

    return grouped(rows, lines_of(Path(path)), caption_of, _LINE, path)


@reader
def caption_folder(rows: Reading, *, path: str) -> Sequence[Item]:
    """Read a folder of images (and its subfolders), each with a text file of the same name with a caption per line.

    Hidden files and folders are left out.

    Raises:
        MLLMError: an image has no text file, or an empty one.
    """

    def item_of(file: Path, number: int) -> Item:
        text_file = file.with_suffix(".txt")
        captions = rows.captions([line for line in text_of(text_file).splitlines() if line.strip()])
        if not captions:
            raise MLLMError(f"{text_file.name} is empty; expected captions, one per line. Write them.")
        return Item(str(file.relative_to(path)), (ImageFile(file),), tuple(captions))

    files = images_in(Path(path), deep=True)
    stems = {file.with_suffix("") for file in files}
    texts = [file for file in visible_in(Path(path), deep=True) if file.suffix == ".txt"]
    if alone := sum(file.with_suffix("") not in stems for file in texts):
        rows.report.counts["text files without an image"] = alone
    records = [Record(str(file), number, lambda file=file: file) for number, file in enumerate(files, start=1)]  # type: ignore[misc]
    return rows.each(records, item_of, "captions, one per line")


def grouped(
    rows: Reading,
    records: Iterable[Record],
    captioned: Callable[[Any, int], Captioned | None],
    expected: str,
    label: str,
) -> Sequence[Item]:
    """Return an item for each image; an image may be in several rows.

    Args:
        rows: the reading.
        records: the rows.
        captioned: returns an image's name, its file and captions, from a row; None leaves the row out.
        expected: the form of a row, for messages.
        label: the file, for messages.
    """

    def named(value: Any, number: int) -> tuple[str, tuple[Path, list[str]]] | None:
        row = captioned(value, number)
        return None if row is None else (row[0], row[1:])

    def item_of(group: tuple[str, list[tuple[Path, list[str]]]], number: int) -> Item:
        name, members = group
        return Item(name, (ImageFile(members[-1][0]),), _some_of([captions for _, captions in members]))

    groups = rows.groups(records, named, expected, lambda name: f"{label}, image {name}")
    return rows.items(groups, item_of, "captions of an image", count=False)


def _some_of(parts: list[list[str]]) -> tuple[str, ...]:
    """Return an image's captions, of which there must be one."""
    captions = tuple(caption for part in parts for caption in part)
    if not captions:
        raise MLLMError("it has no caption; expected at least one. Write one, or remove it.")
    return captions
