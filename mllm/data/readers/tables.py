"""Read tables of images with captions or questions: text files, parquet files and saved `datasets`."""

from __future__ import annotations

import csv
import hashlib
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm.data.files import check_present, inside, json_lines, json_of, text_of, texts
from mllm.data.items import Item
from mllm.data.lazy import Lazy
from mllm.errors import MLLMError, near
from mllm.media.images import ImageBytes, ImageFile, ImageSource


def table(*, path: str, images: str | None = None) -> list[Item]:
    """Read a table of images with captions, or with questions and answers: CSV, TSV, JSON or JSON lines.

    Args:
        path: the file. Columns: ``image`` (a file name), and ``caption``, or ``question`` and ``answer``. In JSON a
            caption or an answer may be a list. Rows with the same image and question become one item.
        images: the folder that the names are relative to; None: the table's folder.

    Raises:
        MLLMError: the file cannot be read, a column is missing, a row is empty, or image files are missing.
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
    return check_present(items, path)


def _id(name: str, question: str | None) -> str:
    return f"{name}#{question}" if question else name


def _columns(row: Any, label: str) -> tuple[str, str | None, list[str]]:
    """Return a row's image, its question if it has one, and its captions or answers."""
    if not isinstance(row, dict):
        raise MLLMError(f"{label}: {row!r} is not a row. Expected the columns 'image' and 'caption'.")
    columns = f"columns found: {', '.join(map(str, row))}"
    image, question = texts(row.get("image")), texts(row.get("question"))
    if len(image) != 1:
        raise MLLMError(f"{label}: no 'image'; {columns}. Name one image file in the column 'image' of each row.")
    answers = texts(row.get("answer") if question else row.get("caption"))
    if not answers:
        raise MLLMError(f"{label}: neither a 'caption' nor a 'question' with an 'answer'; {columns}. Add one of them.")
    return image[0], question[0] if question else None, answers


def _rows(file: Path) -> Iterable[Any]:
    kind = file.suffix.lower()
    if kind in (".csv", ".tsv"):
        try:
            lines = io.StringIO(text_of(file), newline="")  # a quoted field may contain line breaks
            return list(csv.DictReader(lines, delimiter="\t" if kind == ".tsv" else ","))
        except csv.Error as error:
            raise MLLMError(
                f"{file} is not a table: {error}. Expected a header such as 'image,caption'. Correct it."
            ) from None
    if kind in (".jsonl", ".ndjson"):
        return json_lines(file)
    if kind == ".json":
        content = json_of(file)
        if not isinstance(content, list):
            kind = type(content).__name__
            raise MLLMError(
                f"{file} contains a {kind}; expected a list of rows with 'image' and 'caption'. Convert it."
            )
        return content
    raise MLLMError(f"{file}: unknown file type {kind!r}. {near(kind, ['.csv', '.tsv', '.json', '.jsonl'])}")


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
    """Read parquet files that contain the images, as on the Hugging Face Hub: an item per row.

    Args:
        path: a file, or a folder whose ``*.parquet`` files are read in the order of their names.
        image: the column, or columns, of the images: ``{bytes, path}`` or bytes.
        answers: the column of the answers or captions: a text, a list of texts, or a list of ``{answer}``. A number is
            an index into ``choices``. None: there are no answers (a test split).
        question: the column of the question; None: the answers are captions.
        id: the column of the id; None: the row's number.
        kind: the column of the kind, which results are broken down by.
        choices: the column of the list that the answer is chosen from.

    Raises:
        MLLMError: no such file or column, a row without an image, or pyarrow is not installed.
    """
    columns = Columns(image if isinstance(image, list) else [image], answers, question, id, kind, choices)
    rows = enumerate(_parquet_rows(Path(path), columns.named()))
    return check_present([_item(row, number, columns, f"{path}, row {number}") for number, row in rows], path)


def saved_dataset(
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
    return Lazy(
        len(plain),
        lambda index: _item(plain[index], index, columns, f"{path}, row {index}"),
        fingerprint=lambda: digest,
    )


def _saved(path: str, split: str | None) -> Any:
    try:
        import datasets
    except ImportError:
        raise MLLMError("Reading saved data sets needs datasets: pip install 'mllm-assembly[data]'.") from None
    try:
        data = datasets.load_from_disk(path)
    except (OSError, ValueError) as error:
        raise MLLMError(f"{path} is not a readable data set: {error}. Give a folder that save_to_disk wrote.") from None
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
    options = tuple(texts(row[columns.choices])) if columns.choices else ()
    return Item(
        str(row[columns.id]) if columns.id else str(number),
        tuple(_image(row[name], f"{label}, column {name!r}") for name in columns.image),
        tuple(_answers(row[columns.answers], options, label)) if columns.answers else (),
        str(row[columns.question]) if columns.question else None,
        str(row[columns.kind]) if columns.kind else "",
        options,
    )


def _parquet_rows(path: Path, columns: list[str]) -> Iterable[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise MLLMError("Reading parquet files needs pyarrow: pip install 'mllm-assembly[data]'.") from None
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise MLLMError(f"{path} contains no *.parquet files; expected at least one. Give another folder.")
    for file in files:
        try:
            with pyarrow.parquet.ParquetFile(file) as source:
                for column in columns:
                    if column not in source.schema_arrow.names:
                        raise MLLMError(f"{file} has no column {column!r}. {near(column, source.schema_arrow.names)}")
                for batch in source.iter_batches(batch_size=64, columns=columns):
                    yield from batch.to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise MLLMError(f"{file} cannot be read: {error}. Give a parquet file.") from None


def _image(value: Any, label: str) -> ImageSource:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise MLLMError(
            f"{label}: {type(data).__name__} is not an image; expected its bytes. Set 'image' to the images' column."
        )
    return ImageBytes(data, label)


def _answers(value: Any, choices: tuple[str, ...], label: str) -> list[str]:
    """Return a row's answers from any of the forms that data sets have."""
    values = value if isinstance(value, list) else [value]
    answers = []
    for answer in values:
        answer = answer.get("answer") if isinstance(answer, dict) else answer
        if isinstance(answer, int) and choices:
            if not 0 <= answer < len(choices):
                raise MLLMError(f"{label}: the answer is {answer}; expected 0 to {len(choices) - 1}. Correct it.")
            answer = choices[answer]
        answers += texts(answer)
    return answers
