"""Read documents of interleaved texts and images: MMC4 and OBELICS."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mllm.data.files import files_in, inside, records_of, stem_of
from mllm.data.items import Item
from mllm.data.reading import Reading, reader
from mllm.data.records import Changed, Record, chained
from mllm.data.values import text_in
from mllm.errors import MLLMError
from mllm.media.images import ImageFile

Pieces = list[str | ImageFile]


@reader
def mmc4(rows: Reading, *, path: str, images: str, min_similarity: float = 0.0) -> Sequence[Item]:
    """Read MMC4's documents: lines of ``{text_list, image_info: [{image_name, matched_text_index, matched_sim}]}``.

    An image is placed before the sentence that it is matched with. With ``missing: drop``, images whose files are
    missing are left out of their documents; many are no longer online.

    Args:
        rows: the reading.
        path: a JSON Lines file, or a folder of ``*.jsonl`` files.
        images: the folder of the image files.
        min_similarity: images with a lower similarity to their sentence are left out (OpenFlamingo: 0.24).

    Raises:
        MLLMError: a file is missing or has an unexpected form, a document has no text, or image files are missing.
    """

    def pieces(row: Any) -> Pieces:
        images_of: dict[int, list[ImageFile]] = defaultdict(list)
        for info in row["image_info"]:
            if info.get("matched_sim", 1.0) >= min_similarity:
                images_of[int(info["matched_text_index"])].append(ImageFile(inside(images, info["image_name"])))
        wrong = [index for index in images_of if not 0 <= index < len(row["text_list"])]
        if wrong:
            raise MLLMError(f"matched_text_index is {wrong[0]}; expected 0 to {len(row['text_list']) - 1}. Correct it.")
        interleaved: Pieces = []
        for index, text in enumerate(row["text_list"]):
            interleaved += [*images_of[index], text_in(text, "text", empty=True)]
        return interleaved

    expected = "lines of {text_list: [...], image_info: [{image_name, matched_text_index}]}"
    return _documents(rows, path, pieces, " ", expected)


@reader
def obelics(rows: Reading, *, path: str, images: str) -> Sequence[Item]:
    """Read OBELICS' documents: lines of ``{texts: [...], images: [...]}``, where at each index one of the two is null.

    Args:
        rows: the reading.
        path: a JSON Lines file, or a folder of ``*.jsonl`` files.
        images: the folder of the images, which ``images`` names (OBELICS itself has addresses there: download them).

    Raises:
        MLLMError: as for `mmc4`; or the lists differ in length, or have both or neither at an index.
    """

    def pieces(row: Any) -> Pieces:
        if len(row["texts"]) != len(row["images"]):
            raise MLLMError(
                f"it has {len(row['texts'])} texts and {len(row['images'])} images; expected equal numbers, with null "
                "where there is none. Correct the document."
            )
        both = list(zip(row["texts"], row["images"], strict=True))
        if any((text is None) == (name is None) for text, name in both):
            raise MLLMError(
                "it has both a text and an image at an index, or neither; expected one of them. Correct the document."
            )
        return [
            text_in(text, "text", empty=True) if name is None else ImageFile(inside(images, name))
            for text, name in both
        ]

    return _documents(rows, path, pieces, "\n\n", "lines of {texts: [...], images: [...]}")


def _documents(
    rows: Reading, path: str, pieces: Callable[[Any], Pieces], separator: str, expected: str
) -> Sequence[Item]:
    """Return documents without the images that are missing, if those are dropped."""

    def item_of(entry: tuple[str, Any], number: int) -> Item:
        name, row = entry
        document = [piece for piece in pieces(row) if isinstance(piece, str) or rows.available(piece)]
        if not any(isinstance(piece, str) and piece.strip() for piece in document):
            raise MLLMError("no text; expected some to train on. Remove the document.")
        images = tuple(piece for piece in document if isinstance(piece, ImageFile))
        return Item(name, images, (), document=tuple(_joined(document, separator)))

    return rows.items(_named(Path(path)), item_of, expected)


def _named(path: Path) -> Iterable[Record]:
    """Return each document with its name: its number, after its file's name if ``path`` is a folder."""
    files = files_in(path, ".jsonl") if os.path.isdir(path) else [path]
    if not files:
        raise MLLMError(f"{path} contains no *.jsonl files; expected at least one. Give another folder.")
    folder = os.path.isdir(path)

    def named(file: Path) -> Callable[[Record], Record]:
        def change(record: Record) -> Record:
            name = f"{stem_of(file)}/{record.number}" if folder else str(record.number)
            return Record(f"{path}, document {name}", record.number, lambda: (name, record.load()))

        return change

    return chained([Changed(records_of(file, *files), named(file)) for file in files])


def _joined(pieces: Sequence[str | ImageFile], separator: str) -> Iterator[str | ImageFile]:
    """Yield pieces with consecutive texts joined; empty texts are left out."""
    text = ""
    for piece in pieces:
        if isinstance(piece, str):
            text += (separator if text and piece.strip() else "") + piece.strip()
            continue
        if text:
            yield text
        text = ""
        yield piece
    if text:
        yield text
