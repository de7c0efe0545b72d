"""Read sets of images and texts that models are pretrained on, in their authors' formats (MAGMA, arXiv:2112.05253)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mllm.data.files import files_in, images_in, inside, records_of, rows_of
from mllm.data.items import Item
from mllm.data.readers.captions import Captioned, grouped
from mllm.data.reading import Reading, reader
from mllm.data.records import Record, chained
from mllm.data.separated import separated_rows
from mllm.data.values import absent, identifier, text_in
from mllm.errors import MLLMError
from mllm.media.images import ImageFile

_NARRATIVES = "lines of {image_id, caption}"
_REGIONS = "[{id, regions: [{region_id, phrase}]}]"
_WIT = "columns language, image_url and those of captions"
_MEMES = "lines of {id, img, text, label}"
_VERDICTS = {0: "no", 1: "yes"}


@reader
def localized_narratives(rows: Reading, *, path: str, images: str, name: str = "{}.jpg") -> Sequence[Item]:
    """Read Localized Narratives: an item per image, the narratives of all annotators as captions.

    Args:
        rows: the reading.
        path: lines of ``{image_id, caption}``, or a folder of such ``*.jsonl`` files.
        images: the folder of the image files.
        name: the pattern of the image files' names: of Open Images ``{}.jpg``, of COCO ``{:0>12}.jpg``.
    """

    def narrative_of(row: Any, number: int) -> Captioned:
        key = identifier(row["image_id"])
        return key, inside(images, name.format(key)), rows.captions(row["caption"])

    return grouped(rows, _of_files(path, records_of, ".jsonl", ".json"), narrative_of, _NARRATIVES, path)


@reader
def visual_genome_regions(rows: Reading, *, annotations: str, images: str) -> Sequence[Item]:
    """Read Visual Genome's descriptions of regions: an item per image, the phrases of its regions as captions.

    Args:
        rows: the reading.
        annotations: ``region_descriptions.json``: ``[{id, regions: [{region_id, phrase}]}]``.
        images: a folder with the image files ``ID.jpg`` in it or in its subfolders (``VG_100K``, ``VG_100K_2``).
    """
    files = {path.name: path for path in images_in(Path(images), deep=True)}

    def item_of(row: Any, number: int) -> Item:
        key = identifier(row["id"])
        phrases = [phrase for region in row["regions"] for phrase in rows.captions(region["phrase"])]
        if not phrases:
            raise MLLMError("it has no region with a phrase; expected at least one. Write one, or remove it.")
        file = f"{key}.jpg"
        return Item(key, (ImageFile(files.get(file) or inside(images, file)),), tuple(dict.fromkeys(phrases)))

    return rows.items(rows_of(annotations, _REGIONS), item_of, _REGIONS)


@reader
def wit(
    rows: Reading,
    *,
    path: str,
    images: str,
    captions: Sequence[str] = ("caption_reference_description",),
    languages: Sequence[str] | None = None,
) -> Sequence[Item]:
    """Read WIT, Wikipedia's images and their captions: an item per image. Rows without a caption are left out.

    Args:
        rows: the reading.
        path: a TSV file with a header, ``wit_v1.train.all-00000-of-00010.tsv.gz``, or a folder of such files.
        images: the folder of the image files, which bear the names that their addresses (``image_url``) end in.
        captions: the columns of the caption, of which the first with a text counts.
        languages: of the rows, such as ``[en, zh]``; None: all.
    """

    def caption_of(row: Any, number: int) -> Captioned | None:
        language = text_in(row["language"], "language")
        texts = [row[column] for column in captions]
        text = next((text for text in texts if not absent(text)), None)
        if text is None or (languages is not None and language not in languages):
            return None
        file = unquote(text_in(row["image_url"], "image_url")).rpartition("/")[2]
        return file, inside(images, file), rows.captions(text)

    records = _of_files(path, lambda file, *_: separated_rows(file, "\t"), ".tsv")
    return grouped(rows, records, caption_of, _WIT, path)


@reader
def hateful_memes(
    rows: Reading,
    *,
    annotations: str,
    images: str,
    question: str = 'The meme says "{text}". Is it hateful?',
) -> Sequence[Item]:
    """Read Hateful Memes: whether a meme, an image with a text in it, is hateful.

    Args:
        rows: the reading.
        annotations: ``train.jsonl``: lines of ``{id, img, text, label}``; without ``label``: a test split.
        images: the folder that contains ``img``, such as ``img/42953.png``.
        question: asked about each meme; ``{text}`` is the meme's text.
    """

    def item_of(row: Any, number: int) -> Item:
        text = text_in(row["text"], "text").strip()
        answers = (_verdict(row["label"]),) if "label" in row else ()
        asked = question.replace("{text}", text)
        file = ImageFile(inside(images, row["img"]))
        return Item(identifier(row["id"]), (file,), answers, asked, choices=tuple(_VERDICTS.values()))

    return rows.items(records_of(Path(annotations)), item_of, _MEMES)


def _verdict(label: Any) -> str:
    if isinstance(label, bool) or label not in _VERDICTS:
        raise MLLMError(f"the label is {label!r}; expected 0 or 1. Correct it.")
    return _VERDICTS[label]


def _of_files(path: str, read: Callable[..., Iterable[Record]], *suffixes: str) -> Iterable[Record]:
    """Return the rows of a file, or of all files of a folder with one of the suffixes."""
    files = files_in(Path(path), *suffixes) if os.path.isdir(path) else [Path(path)]
    return chained([read(file, *files) for file in files])
