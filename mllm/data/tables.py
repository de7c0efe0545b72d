"""Readers of tables: rows of pictures with captions or questions, in text files or in the hub's parquet mirrors."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mllm.data.items import Item
from mllm.data.reading import inside, json_lines, json_of, present, text_of, texts
from mllm.errors import MLLMError, near
from mllm.images import ImageBytes, ImageFile, ImageSource


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
        Item(_id(name, question), (ImageFile(inside(folder, name, path)),), tuple(answers), question)
        for (name, question), answers in grouped.items()
    ]
    return present(items, path)


def _id(name: str, question: str | None) -> str:
    return f"{name}#{question}" if question else name


def _columns(row: Any, where: str) -> tuple[str, str | None, list[str]]:
    """Return a row's image, its question if it has one, and its captions or answers."""
    if not isinstance(row, dict):
        raise MLLMError(f"{where}: {row!r} is no row. Expected columns 'image' and 'caption'.")
    columns = f"columns found: {', '.join(map(str, row))}"
    image, question = texts(row.get("image")), texts(row.get("question"))
    if len(image) != 1:
        raise MLLMError(f"{where}: no 'image'; {columns}. Each row names one picture file in the column 'image'.")
    answers = texts(row.get("answer") if question else row.get("caption"))
    if not answers:
        raise MLLMError(f"{where}: neither a 'caption' nor a 'question' with an 'answer'; {columns}.")
    return image[0], question[0] if question else None, answers


def _rows(file: Path) -> Iterable[Any]:
    kind = file.suffix.lower()
    if kind in (".csv", ".tsv"):
        try:
            lines = io.StringIO(text_of(file), newline="")  # a quoted field may hold line breaks
            return list(csv.DictReader(lines, delimiter="\t" if kind == ".tsv" else ","))
        except csv.Error as error:
            raise MLLMError(f"{file} is not a table: {error}. Expected a first line 'image,caption'.") from None
    if kind in (".jsonl", ".ndjson"):
        return json_lines(file)
    if kind == ".json":
        content = json_of(file)
        if not isinstance(content, list):
            found = type(content).__name__
            raise MLLMError(f"{file} holds a {found}; expected a list of rows with 'image' and 'caption'.")
        return content
    raise MLLMError(f"{file}: unknown kind {kind!r}. {near(kind, ['.csv', '.tsv', '.json', '.jsonl'])}")


def parquet(
    *,
    path: str,
    image: str | list[str] = "image",
    answers: str | None = None,
    question: str | None = None,
    id: str | None = None,
    kind: str | None = None,
    choices: str | None = None,
) -> list[Item]:
    """Read a data set as the Hugging Face hub mirrors it: parquet files with the pictures inside. One item a row.

    Args:
        path: a file, or a folder whose ``*.parquet`` files are read by name.
        image: the column, or columns, of the picture: ``{bytes, path}`` or bytes.
        answers: the column of the answer or captions: a text, a list of texts, or a list of ``{answer}``. A number is a
            place in ``choices``. None: there are none (a test split).
        question: the column of the question; None: captions are wanted.
        id: the column of the id; None: the row's number.
        kind: the column of what results are broken down by.
        choices: the column of the list that an answer is chosen from.

    Raises:
        MLLMError: no such file or column (those that are there are listed), a row without a picture, or pyarrow is not
            installed.
    """
    columns = {"image": image, "answers": answers, "question": question, "id": id, "kind": kind, "choices": choices}
    wanted = [name for value in columns.values() for name in (value if isinstance(value, list) else [value]) if name]
    items = []
    for number, row in enumerate(_parquet_rows(Path(path), wanted)):
        names = image if isinstance(image, list) else [image]
        where = f"{path}, row {number}"
        pictures = tuple(_picture(row[name], f"{where}, column {name!r}") for name in names)
        listed = tuple(texts(row[choices])) if choices else ()
        items.append(
            Item(
                str(row[id]) if id else str(number),
                pictures,
                tuple(_told(row[answers], listed, where)) if answers else (),
                str(row[question]) if question else None,
                str(row[kind]) if kind else "",
                listed,
            )
        )
    return present(items, path)


def _parquet_rows(path: Path, columns: list[str]) -> Iterable[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise MLLMError("Parquet files need pyarrow: pip install 'mllm-assembly[data]'.") from None
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise MLLMError(f"{path} holds no *.parquet files.")
    for file in files:
        try:
            with pyarrow.parquet.ParquetFile(file) as source:
                for column in columns:
                    if column not in source.schema_arrow.names:
                        raise MLLMError(f"{file} has no column {column!r}. {near(column, source.schema_arrow.names)}")
                for batch in source.iter_batches(batch_size=64, columns=columns):
                    yield from batch.to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise MLLMError(f"{file} cannot be read: {error}") from None


def _picture(value: Any, where: str) -> ImageSource:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise MLLMError(f"{where}: no picture; expected its bytes, found {type(data).__name__}.")
    return ImageBytes(data, where)


def _told(value: Any, choices: tuple[str, ...], where: str) -> list[str]:
    """Return a row's answers from any of the forms that mirrors have them in."""
    values = value if isinstance(value, list) else [value]
    found = []
    for answer in values:
        answer = answer.get("answer") if isinstance(answer, dict) else answer
        if isinstance(answer, int) and choices:
            if not 0 <= answer < len(choices):
                raise MLLMError(f"{where}: the answer is {answer}, of {len(choices)} choices.")
            answer = choices[answer]
        found += texts(answer)
    return found
