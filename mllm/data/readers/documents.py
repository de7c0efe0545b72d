"""Read documents of interleaved texts and images: MMC4 and OBELICS."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from mllm.data.files import expect_form, inside, json_lines, some
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.media.images import ImageFile

Missing = Literal["raise", "drop"]


def mmc4(*, path: str, images: str, min_similarity: float = 0.0, missing: Missing = "raise") -> list[Item]:
    """Read MMC4's documents: lines of ``{text_list, image_info: [{image_name, matched_text_index, matched_sim}]}``.

    An image is placed before the sentence that it is matched with.

    Args:
        path: a JSON Lines file, or a folder of ``*.jsonl`` files.
        images: the folder of the image files.
        min_similarity: images with a lower similarity to their sentence are left out (OpenFlamingo: 0.24).
        missing: ``drop`` leaves out images whose files are missing; many images are no longer online.

    Raises:
        MLLMError: a file is missing or has an unexpected form, a document has no text, or image files are missing.
    """

    def pieces(row: Any) -> list[str | ImageFile]:
        images_of: dict[int, list[ImageFile]] = defaultdict(list)
        for info in row["image_info"]:
            if info.get("matched_sim", 1.0) >= min_similarity:
                images_of[int(info["matched_text_index"])].append(ImageFile(inside(images, info["image_name"], path)))
        wrong = [index for index in images_of if not 0 <= index < len(row["text_list"])]
        if wrong:
            raise MLLMError(
                f"{path}: matched_text_index is {wrong[0]}; expected 0 to {len(row['text_list']) - 1}. Correct it."
            )
        interleaved: list[str | ImageFile] = []
        for index, text in enumerate(row["text_list"]):
            interleaved += [*images_of[index], str(text)]
        return interleaved

    expected = "lines of {text_list: [...], image_info: [{image_name, matched_text_index}]}"
    return _documents(path, pieces, " ", expected, missing)


def obelics(*, path: str, images: str, missing: Missing = "raise") -> list[Item]:
    """Read OBELICS' documents: lines of ``{texts: [...], images: [...]}``, where at each index one of the two is null.

    Args:
        path: a JSON Lines file, or a folder of ``*.jsonl`` files.
        images: the folder of the images, which ``images`` names (OBELICS itself has addresses there: download them).
        missing: as for `mmc4`.

    Raises:
        MLLMError: as for `mmc4`; or the lists differ in length, or have both or neither at an index.
    """

    def pieces(row: Any) -> list[str | ImageFile]:
        if len(row["texts"]) != len(row["images"]):
            raise MLLMError(
                f"{path}: a document has {len(row['texts'])} texts and {len(row['images'])} images; expected equal "
                "numbers, with null where there is none. Correct the document."
            )
        if any((text is None) == (name is None) for text, name in zip(row["texts"], row["images"], strict=True)):
            raise MLLMError(
                f"{path}: a document has both a text and an image at an index, or neither; expected one of them. "
                "Correct the document."
            )
        both = zip(row["texts"], row["images"], strict=True)
        return [str(text) if name is None else ImageFile(inside(images, name, path)) for text, name in both]

    return _documents(path, pieces, "\n\n", "lines of {texts: [...], images: [...]}", missing)


def _documents(
    path: str, pieces: Callable[[Any], list[str | ImageFile]], separator: str, expected: str, missing: Missing
) -> list[Item]:
    items, absent = [], set[str]()
    exists: dict[Path, bool] = {}
    for name, row in _rows(Path(path)):
        with expect_form(f"{path}, document {name}", expected):
            interleaved = pieces(row)
        for piece in interleaved:
            if isinstance(piece, ImageFile) and not exists.setdefault(piece.path, piece.path.is_file()):
                absent.add(str(piece.path))
        document = [piece for piece in interleaved if isinstance(piece, str) or exists[piece.path]]
        if not any(isinstance(piece, str) and piece.strip() for piece in document):
            raise MLLMError(f"{path}, document {name}: no text; expected some to train on. Remove the document.")
        images = tuple(piece for piece in document if isinstance(piece, ImageFile))
        items.append(Item(name, images, (), document=tuple(_joined(document, separator))))
    if absent and missing == "raise":
        raise MLLMError(
            f"{path}: {len(absent)} of {len(exists)} images are missing: {some(sorted(absent))}. Add the files, or set "
            "missing: drop to leave them out of their documents."
        )
    return items


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each document with its name: its number, after its file's name if ``path`` is a folder."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise MLLMError(f"{path} contains no *.jsonl files; expected at least one. Give another folder.")
    for file in files:
        for number, row in enumerate(json_lines(file), start=1):
            yield (f"{file.stem}/{number}" if path.is_dir() else str(number)), row


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
