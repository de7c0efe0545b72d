"""Readers: files as their authors publish them, to items."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mllm.data.items import Item
from mllm.errors import MLLMError, near
from mllm.images import ImageFile


def coco_captions(*, annotations: str, images: str) -> list[Item]:
    """Read captions in COCO's format: one item an image, all its captions as answers.

    Args:
        annotations: JSON with ``images: [{id, file_name}]`` and ``annotations: [{image_id, caption}]``.
        images: the folder with the picture files.

    Raises:
        MLLMError: the file is missing or of another form, or names pictures that are not there.
    """
    content = _json(Path(annotations))
    try:
        files = {image["id"]: _inside(Path(images), image["file_name"], annotations) for image in content["images"]}
        captions: dict[Any, list[str]] = defaultdict(list)
        for row in content["annotations"]:
            captions[row["image_id"]] += _texts(row["caption"])
    except (KeyError, TypeError) as error:
        raise MLLMError(
            f"{annotations} is not in COCO's captions format ({error!r}): expected images: [{{id, file_name}}] and "
            "annotations: [{image_id, caption}]."
        ) from None
    unknown = sorted(str(key) for key in captions.keys() - files.keys())
    if unknown:
        raise MLLMError(f"{annotations}: captions of images that are not listed there: {_some(unknown)}.")
    items = [Item(str(key), (ImageFile(files[key]),), tuple(texts)) for key, texts in captions.items() if texts]
    return _present(items, annotations)


def table(*, path: str, images: str | None = None) -> list[Item]:
    """Read a table of pictures with captions, or with questions and answers: CSV, TSV, JSON or JSON lines.

    Args:
        path: the file. Columns: ``image`` (a file name), and ``caption``, or ``question`` and ``answer``. In JSON a
            caption or an answer may be a list. Rows of one image without a question become one item.
        images: the folder the names are relative to; None: the table's own.

    Raises:
        MLLMError: the file cannot be read, a column is missing, a row is empty, or pictures are not there.
    """
    file = Path(path)
    folder = Path(images) if images else file.parent
    grouped: dict[tuple[str, str | None], list[str]] = defaultdict(list)
    for number, row in enumerate(_rows(file), start=1):
        name, question, answers = _columns(row, f"{path}, row {number}")
        grouped[name, question] += answers
    items = [
        Item(_id(name, question), (ImageFile(_inside(folder, name, path)),), tuple(answers), question)
        for (name, question), answers in grouped.items()
    ]
    return _present(items, path)


def _id(name: str, question: str | None) -> str:
    return f"{name}#{question}" if question else name


def _columns(row: Any, where: str) -> tuple[str, str | None, list[str]]:
    """Return a row's image, its question if it has one, and its captions or answers."""
    if not isinstance(row, dict):
        raise MLLMError(f"{where}: {row!r} is no row. Expected columns 'image' and 'caption'.")
    columns = f"columns found: {', '.join(map(str, row))}"
    image, question = _texts(row.get("image")), _texts(row.get("question"))
    if len(image) != 1:
        raise MLLMError(f"{where}: no 'image'; {columns}. Each row names one picture file in the column 'image'.")
    answers = _texts(row.get("answer") if question else row.get("caption"))
    if not answers:
        raise MLLMError(f"{where}: neither a 'caption' nor a 'question' with an 'answer'; {columns}.")
    return image[0], question[0] if question else None, answers


def _texts(value: Any) -> list[str]:
    """Return a text or a list of texts as a list, without empty ones."""
    texts = [str(text).strip() for text in (value if isinstance(value, list) else [value]) if text is not None]
    return [text for text in texts if text]


def _inside(folder: Path, name: str, label: str) -> Path:
    """Return ``folder/name``, which must be inside ``folder``: a data file does not choose what else is read."""
    path = Path(os.path.normpath(folder / name))
    if not path.is_relative_to(os.path.normpath(folder)):
        raise MLLMError(f"{label}: the picture {name!r} is outside of {folder}. Set 'images' to a folder that has it.")
    return path


def _rows(file: Path) -> Iterable[Any]:
    kind = file.suffix.lower()
    if kind in (".csv", ".tsv"):
        try:
            lines = io.StringIO(_text(file), newline="")  # a quoted field may hold line breaks
            return list(csv.DictReader(lines, delimiter="\t" if kind == ".tsv" else ","))
        except csv.Error as error:
            raise MLLMError(f"{file} is not a table: {error}. Expected a first line 'image,caption'.") from None
    if kind in (".jsonl", ".ndjson"):
        return [_parsed(line, f"{file}, line {n}") for n, line in enumerate(_text(file).split("\n"), 1) if line.strip()]
    if kind == ".json":
        content = _json(file)
        if not isinstance(content, list):
            found = type(content).__name__
            raise MLLMError(f"{file} holds a {found}; expected a list of rows with 'image' and 'caption'.")
        return content
    raise MLLMError(f"{file}: unknown kind {kind!r}. {near(kind, ['.csv', '.tsv', '.json', '.jsonl'])}")


def _present(items: list[Item], label: str) -> list[Item]:
    """Return the items, all of whose files are there."""
    paths = [image.path for item in items for image in item.images if isinstance(image, ImageFile)]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise MLLMError(
            f"{label}: {len(missing)} of {len(paths)} pictures are not there: {_some(missing)}. "
            "Put them there, or take their rows out."
        )
    if not items:
        raise MLLMError(f"{label} holds no items.")
    return items


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MLLMError(f"{file} cannot be read: {error}") from None


def _json(file: Path) -> Any:
    return _parsed(_text(file), str(file))


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise MLLMError(f"{where} is not JSON: {error}") from None
