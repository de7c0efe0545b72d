"""Read tables of images with captions or questions: text files, parquet files and saved `datasets`."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mllm.data.files import check_regular, files_in, inside, records_of, rows_of, suffix_of
from mllm.data.items import Item
from mllm.data.lazy import Lazy
from mllm.data.reading import Reading, reader
from mllm.data.records import Record
from mllm.data.separated import separated_rows
from mllm.data.values import absent, answers_in, captions_in, identifier, listed, text_in
from mllm.errors import MLLMError, first_line, near
from mllm.media.images import ImageBytes, ImageFile, ImageSource
from mllm.media.videos import file_of

_ROW = "'image' and 'caption', or 'image', 'question' and 'answer'"

_Key = tuple[tuple[str, ...], str | None]  # the images of rows that are one item, and their question


@reader
def table(rows: Reading, *, path: str, images: str | None = None) -> Sequence[Item]:
    """Read a table of images with captions, or with questions and answers: CSV, TSV, JSON or JSON lines.

    Args:
        rows: the reading.
        path: the file. Columns: ``image`` (a file name), and ``caption``, or ``question`` and ``answer``. In JSON an
            image, a caption or an answer may be a list. Rows with the same images and question become one item.
        images: the folder that the names are relative to; None: the table's folder.

    Raises:
        MLLMError: the file cannot be read, a column is missing, a row is empty, or image files are missing.
    """
    file = Path(path)
    folder = Path(images) if images else file.parent

    def image_of(name: str) -> ImageFile:
        return file_of(inside(folder, name))

    def row_of(row: Any, number: int) -> tuple[_Key, tuple[tuple[ImageFile, ...], list[str]]]:
        names, question, answers = _columns(row, rows)
        return (names, question), (tuple(map(image_of, names)), answers)

    def item_of(group: tuple[_Key, list[tuple[tuple[ImageFile, ...], list[str]]]], number: int) -> Item:
        (names, question), members = group
        answers = tuple(answer for _, some in members for answer in some)
        return Item(_id(names, question), members[-1][0], answers, question)

    groups = rows.groups(_records(file), row_of, _ROW, lambda key: f"{file}, {_id(*key)}")
    return rows.items(groups, item_of, _ROW, count=False)


def _id(names: tuple[str, ...], question: str | None) -> str:
    return ", ".join(names) + (f"#{question}" if question else "")


def _columns(row: Any, rows: Reading) -> tuple[tuple[str, ...], str | None, list[str]]:
    """Return a row's images, its question if it has one, and its captions or answers."""
    if not isinstance(row, dict):
        raise MLLMError(f"{str(row)[:60]!r} is not a row. Expected the columns 'image' and 'caption'.")
    image, question, caption = (row.get(name) for name in ("image", "question", "caption"))
    if absent(image):
        raise MLLMError(f"no 'image'; {_found(row)}. Name an image file in the column 'image' of each row.")
    names = tuple(text_in(name, "image").strip() for name in listed(image))
    asked = None if absent(question) else text_in(question, "question").strip()
    if asked and not absent(caption):
        raise MLLMError("it has both a 'caption' and a 'question'. Write a row for each.")
    value = row.get("answer") if asked else caption
    answers = [] if absent(value) else (rows.answers if asked else rows.captions)(value)
    if not answers:
        raise MLLMError(f"neither a 'caption' nor a 'question' with an 'answer'; {_found(row)}. Add one of them.")
    return names, asked, answers


def _found(row: Mapping[str, Any]) -> str:
    return f"columns found: {', '.join(map(str, row))}"


def _records(file: Path) -> Iterable[Record]:
    kind = suffix_of(file)
    if kind in (".csv", ".tsv"):
        return separated_rows(file, "\t" if kind == ".tsv" else ",")
    if kind in (".jsonl", ".ndjson"):
        return records_of(file)
    if kind != ".json":
        raise MLLMError(f"{file}: unknown file type {kind!r}. {near(kind, ['.csv', '.tsv', '.json', '.jsonl'])}")
    return rows_of(file, "a list of rows with 'image' and 'caption'")


@reader
def parquet(
    rows: Reading,
    *,
    path: str,
    image: str | list[str] = "image",
    answers: str | None = None,
    question: str | None = None,
    id: str | None = None,
    kind: str | None = None,
    choices: str | None = None,
) -> list[Item]:
    """Read parquet files that contain the images, as on the Hugging Face Hub: an item per row.

    Args:
        rows: the reading.
        path: a file, or a folder whose ``*.parquet`` files are read in the order of their names.
        image: the column, or columns, of the images: ``{bytes, path}`` or bytes.
        answers: the column of the answers or captions: a text, a list of texts, or a list of ``{answer}``. A number is
            an index into ``choices``. None: there are no answers (a test split).
        question: the column of the question; None: the answers are captions.
        id: the column of the id; None: the row's number.
        kind: the column of the kind, which results are broken down by.
        choices: the column of the list that the answer is chosen from.

    Raises:
        MLLMError: no such file or column, a bad row, or pyarrow is not installed.
    """
    columns = Columns(image if isinstance(image, list) else [image], answers, question, id, kind, choices)
    contents = parquet_rows(Path(path), columns.named())
    records = (
        Record(f"{path}, row {number}", number, lambda row=row: row)  # type: ignore[misc]
        for number, row in enumerate(contents)
    )
    label = f"{path}, row"
    return rows.each(records, lambda row, number: _item(row, number, columns, label), "an image and its texts")


@reader
def saved_dataset(
    rows: Reading,
    *,
    path: str,
    split: str | None = None,
    image: str | list[str] = "image",
    answers: str | None = None,
    question: str | None = None,
    id: str | None = None,
    kind: str | None = None,
    choices: str | None = None,
) -> Lazy:
    """Read a data set that `datasets` saved (``save_to_disk``): an item per row, read from disk when it is needed.

    Args:
        rows: the reading.
        path: the folder.
        split: the split, if the folder contains several.
        image, answers, question, id, kind, choices: columns, as for `parquet`.

    Raises:
        MLLMError: no such folder, split or column, or `datasets` is not installed.
    """
    columns = Columns(image if isinstance(image, list) else [image], answers, question, id, kind, choices)
    data = _saved(path, split)
    for name in columns.named():
        if name not in data.column_names:
            raise MLLMError(f"{path} has no column {name!r}. {near(name, data.column_names)}")
    plain = data.select_columns(columns.named()).with_format(None)
    for name in columns.image:
        if hasattr(plain.features[name], "decode"):
            plain = plain.cast_column(name, type(plain.features[name])(decode=False))  # keep the encoded bytes
    digest = hashlib.sha256(f"{data._fingerprint} {columns}".encode()).hexdigest()
    rows.report.rows = len(plain)

    def make(index: int) -> Item:
        (item,) = reading.each([Record(f"{path}, row {index}", index, lambda: _read(plain, index))], item_of, "a row")
        return item

    reading = Reading()  # a row is read when it is needed, and what is wrong with it is an error then
    item_of = partial(_item, columns=columns, label=f"{path}, row")
    items = Lazy(len(plain), make, fingerprint=lambda: digest)
    doubled = _doubled(_read(plain, id), rows, path) if id else set()
    return items.part([index for index in range(len(plain)) if index not in doubled]) if doubled else items


def _doubled(ids: Iterable[Any], rows: Reading, path: str) -> set[int]:
    """Return the rows whose id other rows have, too, which is bad."""
    names = list(map(identifier, ids))
    times = Counter(names)
    for name in (name for name, number in times.items() if number > 1):
        rows.bad(f"{path}: the id {name!r} belongs to {times[name]} rows; expected one. Remove the others.")
    return {index for index, name in enumerate(names) if times[name] > 1}


def _read(data: Any, key: int | str) -> Any:
    """Return a row or a column of a saved data set."""
    try:
        return data[key]
    except Exception as error:  # of arrow: each kind of damage has errors of its own
        raise MLLMError(f"it cannot be read: {first_line(error)} Save the data set again.") from None


def _saved(path: str, split: str | None) -> Any:
    try:
        import datasets
    except ImportError:
        raise MLLMError("Reading saved data sets needs datasets: pip install 'mllm-assembly[data]'.") from None
    for file in Path(path).rglob("*"):
        if not os.path.isdir(file):
            check_regular(file)
    try:
        data = datasets.load_from_disk(path)
    except Exception as error:  # of its files' damage
        raise MLLMError(
            f"{path} is not a readable data set: {first_line(error)} Give a folder that save_to_disk wrote."
        ) from None
    if not isinstance(data, datasets.DatasetDict):
        return data
    if split not in data:
        raise MLLMError(f"{path} has no split {split!r}. {near(str(split), list(data))}")
    return data[split]


@dataclass(frozen=True)
class Columns:
    """The columns of a table: the names of the columns of an item's fields."""

    image: list[str]
    answers: str | None
    question: str | None
    id: str | None
    kind: str | None
    choices: str | None

    def named(self) -> list[str]:
        """Return the names of the columns that are read."""
        rest = (self.answers, self.question, self.id, self.kind, self.choices)
        return [*self.image, *(name for name in rest if name)]


def _item(row: Mapping[str, Any], number: int, columns: Columns, label: str) -> Item:
    options = tuple(answers_in(row[columns.choices])) if columns.choices else ()
    asked = text_in(row[columns.question], "question") if columns.question else None
    return Item(
        identifier(row[columns.id]) if columns.id else str(number),
        tuple(image for name in columns.image for image in _images(row[name], f"{label} {number}, column {name!r}")),
        tuple(_answers(row[columns.answers], options, asked is None)) if columns.answers else (),
        asked,
        text_in(row[columns.kind], "kind", numbers=True, empty=True) if columns.kind else "",
        options,
    )


def parquet_rows(path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet file, or of all in a folder, with some of their columns.

    Raises:
        MLLMError: there is no file or no such column, it is damaged, or pyarrow is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise MLLMError("Reading parquet files needs pyarrow: pip install 'mllm-assembly[data]'.") from None
    files = files_in(path, ".parquet") if os.path.isdir(path) else [path]
    if not files:
        raise MLLMError(f"{path} contains no *.parquet files; expected at least one. Give another folder.")
    for file in files:
        check_regular(file)
        try:
            with pyarrow.parquet.ParquetFile(file) as source:
                for column in columns:
                    if column not in source.schema_arrow.names:
                        raise MLLMError(f"{file} has no column {column!r}. {near(column, source.schema_arrow.names)}")
                for batch in source.iter_batches(batch_size=64, columns=columns):
                    yield from batch.to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise MLLMError(f"{file} cannot be read: {error}. Give a parquet file.") from None


def _images(value: Any, label: str) -> Iterator[ImageSource]:
    """Yield the images of a cell: one, or a list of them."""
    for image in listed(value):
        data = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(data, bytes):
            kind = type(data).__name__
            raise MLLMError(f"{kind} is not an image; expected its bytes. Set 'image' to the images' column.")
        yield ImageBytes(data, label)


def _answers(value: Any, choices: tuple[str, ...], caption: bool) -> list[str]:
    """Return a row's captions, or its answers from any of the forms that data sets have; empty ones are left out."""
    answers = []
    for answer in listed(value):
        answer = answer["answer"] if isinstance(answer, dict) else answer
        if isinstance(answer, int) and choices:
            if isinstance(answer, bool) or not 0 <= answer < len(choices):
                raise MLLMError(f"the answer is {answer}; expected 0 to {len(choices) - 1}. Correct it.")
            answer = choices[answer]
        answers += captions_in(answer) if caption and not choices else answers_in(answer)
    return [answer for answer in answers if answer]
