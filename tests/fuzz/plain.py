"""Read data files again, each format in a few strict lines, to compare what the readers return.

A function takes the folder of the files and returns a row ``(id, image names, question, answers)`` for each item. It
raises whatever a wrong value raises: the reader has to refuse the file then. None stands for what is not compared.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = tuple[str | None, tuple[str, ...] | None, str | None, tuple[str, ...] | None]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len({key for key, _ in pairs}) == len(pairs), "a key is there twice"
    return dict(pairs)


def parsed(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object)


def text_of(path: Path) -> str:
    return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def lines_of(path: Path) -> list[Any]:
    """Return the values of a file of JSON lines, or of one list."""
    text = text_of(path)
    if text.lstrip().startswith("["):
        rows = parsed(text)
        assert isinstance(rows, list)
        return rows
    return [parsed(line) for line in text.split("\n") if line.strip()]


def text(value: Any, *, empty: bool = False) -> str:
    if empty and value is None:
        return ""
    assert isinstance(value, str) and "\0" not in value and value.encode() is not None
    assert empty or value.strip()
    return value


def answer(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        assert math.isfinite(value)
        return str(value)
    return text(value, empty=True)


def name(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    assert isinstance(value, int | str) and not isinstance(value, bool) and value != ""
    return str(value)


def captions(values: Iterable[Any]) -> tuple[str, ...]:
    kept = tuple(caption for value in values if (caption := text(value, empty=True).strip()))
    assert kept
    return kept


def annotators(values: Any) -> tuple[str, ...]:
    assert isinstance(values, list)
    answers = tuple(map(answer, values))
    assert any(value.strip() for value in answers)
    return answers


def once(rows: list[Row]) -> list[Row]:
    """Check that no id is there twice."""
    assert len({row[0] for row in rows}) == len(rows)
    return rows


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def coco(folder: Path) -> list[Row]:
    content = parsed(text_of(folder / "coco.json"))
    files: dict[str, Any] = {}
    for row in content["images"]:
        key = name(row["id"])
        assert files.setdefault(key, row["file_name"]) == row["file_name"]
    texts: dict[str, list[Any]] = defaultdict(list)
    for row in content["annotations"]:
        key = name(row["image_id"])
        assert key in files
        if not (row.get("is_rejected") or row.get("is_precanned")):
            texts[key] += listed(row["caption"])
    return [(key, (text(files[key]),), None, captions(values)) for key, values in texts.items()]


def karpathy(folder: Path) -> list[Row]:
    rows: list[Row] = []
    for row in parsed(text_of(folder / "karpathy.json"))["images"]:
        if text(row["split"]) == "test":
            key = name(row.get("cocoid", row.get("imgid", row["filename"])))
            raw = [caption for sentence in row["sentences"] for caption in listed(sentence["raw"])]
            rows.append((key, (text(row["filename"]),), None, captions(raw)))
    return once(rows)


def textcaps(folder: Path) -> list[Row]:
    texts: dict[str, list[Any]] = defaultdict(list)
    for row in parsed(text_of(folder / "textcaps.json"))["data"]:
        texts[name(row["image_id"])] += listed(row["caption_str"])
    return [(key, (f"{key}.jpg",), None, captions(values)) for key, values in texts.items()]


def caption_lines(folder: Path) -> list[Row]:
    texts: dict[str, list[str]] = defaultdict(list)
    for line in text_of(folder / "lines.tsv").split("\n"):
        if line.strip():
            caption, file = line.split("\t")
            assert caption.strip() and file.strip()
            texts[text(file).strip()].append(caption)
    return [(key, (key,), None, captions(values)) for key, values in texts.items()]


def table(rows: Iterable[Any]) -> list[Row]:
    """Return the items of a table: rows of the same images and question are one."""
    grouped: dict[tuple[tuple[str, ...], str | None], list[str]] = defaultdict(list)
    for row in rows:
        question, caption = row.get("question"), row.get("caption")
        asked = None if question is None or not text(question, empty=True).strip() else question.strip()
        images = tuple(text(image).strip() for image in listed(row["image"]))
        assert images
        if asked is None:
            values = list(captions(listed(caption)))
        else:
            assert caption is None or not str(caption).strip() or caption == []
            values = [value for value in (answer(value).strip() for value in listed(row["answer"])) if value]
            assert values
        grouped[images, asked] += values
    return [(None, images, asked, tuple(values)) for (images, asked), values in grouped.items()]


def separated(path: Path, delimiter: str) -> list[dict[str, str]]:
    """Return the rows of a CSV or TSV file, field by field as RFC 4180 says."""
    fields: list[list[str]] = [[""]]
    quoted = after = False
    for character in text_of(path):
        if quoted:
            if character == '"':
                quoted, after = False, True
            else:
                fields[-1][-1] += character
        elif character == '"' and after:  # a quotation mark, written as two
            fields[-1][-1] += '"'
            quoted, after = True, False
        elif character == '"' and not fields[-1][-1]:
            quoted, after = True, False
        elif character == delimiter:
            fields[-1].append("")
            after = False
        elif character == "\n":
            fields.append([""])
            after = False
        else:
            assert not after, "text behind a quoted field"
            fields[-1][-1] += character
    assert not quoted, "a field that is not closed"
    (head, *rows) = [row for row in fields if any(field.strip() for field in row)]
    head = [field.strip() for field in head]
    assert len(set(filter(None, head))) == len(list(filter(None, head)))
    assert all(len(row) == len(head) for row in rows)
    return [dict(zip(head, row, strict=True)) for row in rows]


def vqa(folder: Path) -> list[Row]:
    def by_id(rows: Any) -> dict[str, Any]:
        keys = [name(row["question_id"]) for row in rows]
        assert len(set(keys)) == len(keys)
        return dict(zip(keys, rows, strict=True))

    asked = by_id(parsed(text_of(folder / "questions.json"))["questions"])
    answered = by_id(parsed(text_of(folder / "annotations.json"))["annotations"])
    assert asked.keys() == answered.keys()
    return [
        (key, (f"{row['image_id']:04d}.jpg",), text(row["question"]),
         annotators([one["answer"] for one in answered[key]["answers"]]))
        for key, row in asked.items()
    ]  # fmt: skip


def vizwiz(folder: Path) -> list[Row]:
    rows = parsed(text_of(folder / "vizwiz.json"))
    assert isinstance(rows, list)
    return once([
        (name(row["image"]), (text(row["image"]),), text(row["question"]).strip(),
         annotators([one["answer"] for one in row["answers"]]) if row.get("answers", []) != [] else ())
        for row in rows
    ])  # fmt: skip


def aokvqa(folder: Path) -> list[Row]:
    rows = parsed(text_of(folder / "aokvqa.json"))
    assert isinstance(rows, list)
    return once([
        (name(row["question_id"]), (f"{row['image_id']:012d}.jpg",), text(row["question"]).strip(),
         annotators(row["direct_answers"]) if row["direct_answers"] != [] else ())
        for row in rows if not row.get("difficult_direct_answer")
    ])  # fmt: skip


def gqa(folder: Path) -> list[Row]:
    return [
        (key, (f"{row['imageId']}.jpg",), text(row["question"]).strip(), annotators([row["answer"]]))
        for key, row in parsed(text_of(folder / "gqa.json")).items()
    ]


def textvqa(folder: Path) -> list[Row]:
    return once([
        (name(row["question_id"]), (f"{row['image_id']}.jpg",), text(row["question"]).strip(),
         annotators(row["answers"]) if row.get("answers", []) != [] else ())
        for row in parsed(text_of(folder / "textvqa.json"))["data"]
    ])  # fmt: skip


def scienceqa(folder: Path) -> list[Row]:
    rows: list[Row] = []
    for key, row in parsed(text_of(folder / "problems.json")).items():
        if text(row["split"]) == "test" and row["image"]:
            asked = text(row["question"]).strip()
            hint = text(row.get("hint"), empty=True).strip()
            index = row["answer"]
            assert isinstance(index, int) and not isinstance(index, bool) and index >= 0
            asked = f"{hint}\n{asked}" if hint else asked
            rows.append((key, (row["image"],), asked, (answer(row["choices"][index]),)))
    return rows


def pope(folder: Path) -> list[Row]:
    return once([
        (f"pope/{name(row['question_id'])}", (text(row["image"]),), text(row["text"]).strip(), (answer(row["label"]),))
        for row in lines_of(folder / "pope.json")
    ])  # fmt: skip


def snli_ve(folder: Path) -> list[Row]:
    verdicts = {"entailment": "yes", "neutral": "maybe", "contradiction": "no"}
    return once([
        (name(row.get("pairID", number)), (f"{row['Flickr30K_ID']}.jpg",),
         f'Does the image show that "{text(row["sentence2"]).strip()}"?', (verdicts[row["gold_label"]],))
        for number, row in enumerate(lines_of(folder / "snli.jsonl"))
    ])  # fmt: skip


def winoground(folder: Path) -> list[Row]:
    rows = lines_of(folder / "winoground.jsonl")
    for row in rows:
        text(row["caption_0"]), text(row["caption_1"])
    images = [tuple(f"{Path(row[key]).stem}.png" for key in ("image_0", "image_1")) for row in rows]
    return once([(name(row["id"]), pair, None, None) for row, pair in zip(rows, images, strict=True)])


def decisions(folder: Path) -> list[Row]:
    rows = lines_of(folder / "decisions.jsonl")
    assert all(row["label"] in ("retrieve", "generate") for row in rows)
    return [(str(number), (), text(row["prompt"]).strip(), (row["label"],)) for number, row in enumerate(rows, start=1)]


def mini_imagenet(folder: Path) -> list[Row]:
    rows = parsed(text_of(folder / "mini.json"))
    assert isinstance(rows, list)
    return [
        (str(number), (text(row["question_image"]),), text(row["question"]), (answer(row["answer"]),))
        for number, row in enumerate(rows)
    ]


def stories(folder: Path) -> list[str]:
    """Return each of VIST's stories whose images are all there, once for each of three contents."""
    photos: dict[str, list[str]] = defaultdict(list)
    for (scene,) in parsed(text_of(folder / "vist.json"))["annotations"]:
        photos[name(scene["story_id"])].append(name(scene["photo_flickr_id"]))
    files = {path.stem for path in (folder / "images").iterdir()}
    return [story for story, names in photos.items() if set(names) <= files] * 3


def counted(load: Callable[[Path], list[Any]]) -> Callable[[Path], list[Row]]:
    """Return a function that counts the rows of a file, of which nothing else is compared."""
    return lambda folder: [(None, None, None, None) for _ in load(folder)]
