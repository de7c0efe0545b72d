"""Readers: files as their authors publish them, to items."""

from __future__ import annotations

import csv
import json
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
        files = {image["id"]: Path(images) / image["file_name"] for image in content["images"]}
        captions: dict[Any, list[str]] = defaultdict(list)
        for row in content["annotations"]:
            captions[row["image_id"]].append(str(row["caption"]).strip())
    except (KeyError, TypeError) as error:
        raise MLLMError(
            f"{annotations} is not in COCO's captions format ({error!r}): expected images: [{{id, file_name}}] and "
            "annotations: [{image_id, caption}]."
        ) from None
    unknown = sorted(str(key) for key in captions.keys() - files.keys())
    if unknown:
        raise MLLMError(f"{annotations}: captions of images that are not listed there: {_some(unknown)}.")
    return _present(
        [Item(str(key), (ImageFile(files[key]),), tuple(texts)) for key, texts in captions.items()], annotations
    )


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
        Item(f"{name}#{question}" if question else name, (ImageFile(folder / name),), tuple(answers), question)
        for (name, question), answers in grouped.items()
    ]
    return _present(items, path)


def _columns(row: Any, where: str) -> tuple[str, str | None, list[str]]:
    if not isinstance(row, dict) or not row.get("image"):
        raise MLLMError(f"{where}: no 'image'. Each row names a picture in the column 'image'.")
    answer = row.get("answer") if row.get("question") else row.get("caption")
    answers = [str(text).strip() for text in (answer if isinstance(answer, list) else [answer]) if text]
    if not answers:
        raise MLLMError(
            f"{where}: neither a 'caption' nor a 'question' with an 'answer'; columns found: {', '.join(map(str, row))}."
        )
    return str(row["image"]), row.get("question") or None, answers


def _rows(file: Path) -> Iterable[Any]:
    kind = file.suffix.lower()
    if kind in (".csv", ".tsv"):
        text = _text(file)
        return list(csv.DictReader(text.splitlines(), delimiter="\t" if kind == ".tsv" else ","))
    if kind in (".jsonl", ".ndjson"):
        return [_parsed(line, f"{file}, line {n}") for n, line in enumerate(_text(file).splitlines(), 1) if line.strip()]
    if kind == ".json":
        content = _json(file)
        if not isinstance(content, list):
            raise MLLMError(f"{file} holds a {type(content).__name__}; expected a list of rows with 'image' and 'caption'.")
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
