"""Readers of interleaved documents, texts and pictures as they stand in a page: MMC4's form and OBELICS'."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from mllm.data.files import form, inside, json_lines, some
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.media.images import ImageFile

Missing = Literal["raise", "drop"]


def mmc4(*, path: str, images: str, min_similarity: float = 0.0, missing: Missing = "raise") -> list[Item]:
    """Read MMC4's documents: ``{text_list, image_info: [{image_name, matched_text_index, matched_sim}]}``, a line each.

    A picture stands before the sentence it is matched with.

    Args:
        path: a file of JSON lines, or a folder of ``*.jsonl``.
        images: the folder of the pictures.
        min_similarity: pictures that match their sentence less are left out (OpenFlamingo: 0.24).
        missing: ``drop`` leaves out pictures whose files are not there; many pages' no longer are.

    Raises:
        MLLMError: a file is missing or of another form, a document has no text, or pictures are not there.
    """

    def pieces(row: Any) -> list[str | ImageFile]:
        stands: dict[int, list[ImageFile]] = defaultdict(list)
        for info in row["image_info"]:
            if info.get("matched_sim", 1.0) >= min_similarity:
                stands[int(info["matched_text_index"])].append(ImageFile(inside(images, info["image_name"], path)))
        wrong = [place for place in stands if not 0 <= place < len(row["text_list"])]
        if wrong:
            raise MLLMError(f"{path}: matched_text_index is {wrong[0]}, of {len(row['text_list'])} texts.")
        found: list[str | ImageFile] = []
        for place, text in enumerate(row["text_list"]):
            found += [*stands[place], str(text)]
        return found

    expected = "lines of {text_list: [...], image_info: [{image_name, matched_text_index}]}"
    return _documents(path, pieces, " ", expected, missing)


def obelics(*, path: str, images: str, missing: Missing = "raise") -> list[Item]:
    """Read OBELICS' documents: ``{texts: [...], images: [...]}``, a line each, of which one is null at each place.

    Args:
        path: a file of JSON lines, or a folder of ``*.jsonl``.
        images: the folder of the pictures, which ``images`` names (OBELICS itself has addresses there: download them).
        missing: as for `mmc4`.

    Raises:
        MLLMError: as `mmc4`; or the lists differ in length, or have both or none at a place.
    """

    def pieces(row: Any) -> list[str | ImageFile]:
        if len(row["texts"]) != len(row["images"]):
            raise MLLMError(f"{path}: {len(row['texts'])} texts and {len(row['images'])} images in a document.")
        if any((text is None) == (name is None) for text, name in zip(row["texts"], row["images"], strict=True)):
            raise MLLMError(f"{path}: a document has a text and an image at one place, or none; expected one of them.")
        both = zip(row["texts"], row["images"], strict=True)
        return [str(text) if name is None else ImageFile(inside(images, name, path)) for text, name in both]

    return _documents(path, pieces, "\n\n", "lines of {texts: [...], images: [...]}", missing)


def _documents(
    path: str, pieces: Callable[[Any], list[str | ImageFile]], joint: str, expected: str, missing: Missing
) -> list[Item]:
    items, gone = [], set[str]()
    there: dict[Path, bool] = {}
    for name, row in _rows(Path(path)):
        with form(f"{path}, document {name}", expected):
            found = pieces(row)
        for piece in found:
            if isinstance(piece, ImageFile) and not there.setdefault(piece.path, piece.path.is_file()):
                gone.add(str(piece.path))
        kept = [piece for piece in found if isinstance(piece, str) or there[piece.path]]
        if not any(isinstance(piece, str) and piece.strip() for piece in kept):
            raise MLLMError(f"{path}, document {name}: no text, so there is nothing to learn. Take it out.")
        pictures = tuple(piece for piece in kept if isinstance(piece, ImageFile))
        items.append(Item(name, pictures, (), document=tuple(_joined(kept, joint))))
    if gone and missing == "raise":
        raise MLLMError(
            f"{path}: {len(gone)} of {len(there)} pictures are not there: {some(sorted(gone))}. Put them there, or set "
            "missing: drop to leave them out of their documents."
        )
    return items


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each document with its name: its file, where there are several, and its number."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise MLLMError(f"{path} holds no *.jsonl files.")
    for file in files:
        for number, row in enumerate(json_lines(file), start=1):
            yield (f"{file.stem}/{number}" if path.is_dir() else str(number)), row


def _joined(pieces: Sequence[str | ImageFile], joint: str) -> Iterator[str | ImageFile]:
    """Yield pieces with texts that follow each other made one; empty ones are left out."""
    text = ""
    for piece in pieces:
        if isinstance(piece, str):
            text += (joint if text and piece.strip() else "") + piece.strip()
            continue
        if text:
            yield text
        text = ""
        yield piece
    if text:
        yield text
