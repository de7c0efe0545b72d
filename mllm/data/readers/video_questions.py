"""Read questions about videos in the file formats that their authors publish."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from mllm.data.files import files_in, inside, json_of, records_of, rows_of, stem_of, suffix_of, text_of
from mllm.data.items import Item
from mllm.data.readers.tables import parquet_rows
from mllm.data.reading import Reading, reader
from mllm.data.records import Record
from mllm.data.separated import separated_rows
from mllm.data.values import absent, identifier, reference_answers, text_in
from mllm.errors import MLLMError
from mllm.media.videos import SUFFIXES, VideoFile

_MSVD_QA = "[{id, video_id, question, answer}]"
_ACTIVITYNET_QA = "[{question_id, video_name, question}] and [{question_id, answer, type}]"
_NEXT_QA = "columns video, question, answer, qid, type, and a0 to a4 for multiple choice"
_VIDEO_MME = "columns question_id, videoID, question, options, answer, duration"
_MVBENCH = "[{video, question, candidates, answer}], with start and end where a part of the video is meant"
_TYPES = ("motion", "spatial", "temporal", "yes/no", "color", "object", "location", "number", "other")
_OPTIONS = "ABCDEFGH"


@reader
def msvd_qa(rows: Reading, *, annotations: str, images: str, mapping: str | None = None) -> list[Item]:
    """Read MSVD-QA or MSRVTT-QA; the kind is the question's first word: what, who, how, when, where.

    Args:
        rows: the reading.
        annotations: ``[{id, video_id, question, answer}]``: ``test_qa.json``.
        images: the folder of the videos: ``video7010.mp4`` of MSRVTT, or as ``mapping`` names them.
        mapping: MSVD's ``youtube_mapping.txt``: lines of a video's name and ``vid`` with its number; None: of MSRVTT.
    """
    video_of = _videos(images)
    names = {} if mapping is None else _mapped(mapping)

    def item_of(row: Any, number: int) -> Item:
        name = f"video{row['video_id']}" if mapping is None else names[f"vid{row['video_id']}"]
        question = text_in(row["question"], "question").strip()
        kind = question.split()[0].lower()
        return Item(identifier(row["id"]), (video_of(name),), _answer(row), question, kind)

    return rows.each(rows_of(annotations, _MSVD_QA), item_of, _MSVD_QA)


@reader
def activitynet_qa(rows: Reading, *, questions: str, images: str, annotations: str | None = None) -> list[Item]:
    """Read ActivityNet-QA; the kind is the type of the question or of its answer.

    Args:
        rows: the reading.
        questions: ``[{question_id, video_name, question}]``: ``test_q.json``.
        images: the folder of the videos, ``v_NAME`` or ``NAME``.
        annotations: ``[{question_id, answer, type}]``: ``test_a.json``; None: there are no answers.
    """
    video_of = _videos(images)
    answered: dict[str, Any] = {}
    if annotations is not None:
        labels = rows_of(annotations, _ACTIVITYNET_QA)
        pairs = rows.each(labels, lambda row, _: (identifier(row["question_id"]), row), _ACTIVITYNET_QA, count=False)
        answered = rows.by_id(pairs, f"{annotations}: the question_id")

    def item_of(row: Any, number: int) -> Item:
        key, name = identifier(row["question_id"]), text_in(row["video_name"], "video_name")
        if annotations is not None and answered.get(key) is None:
            raise MLLMError(
                f"the question_id {key!r} has no answer in {annotations}. Give two files of the same split."
            )
        right = _answer(answered[key]) if answered else ()
        kind = _TYPES[answered[key]["type"]] if answered else ""
        return Item(key, (video_of(f"v_{name}", name),), right, text_in(row["question"], "question").strip(), kind)

    return rows.each(rows_of(questions, _ACTIVITYNET_QA), item_of, _ACTIVITYNET_QA)


@reader
def next_qa(
    rows: Reading, *, annotations: str, images: str, mapping: str, task: Literal["choices", "open"] = "choices"
) -> list[Item]:
    """Read NExT-QA; the kind is the question's type: CW, CH (causal), TN, TC, TP (temporal), DC, DL, DO (descriptive).

    Args:
        rows: the reading.
        annotations: a CSV file: ``video, question, answer, qid, type``; for ``choices`` also ``a0`` to ``a4``, of which
            ``answer`` is the index, for ``open`` also ``additional_ref_answer``.
        images: the folder of the videos, ``1164/2834146886.mp4``.
        mapping: ``map_vid_vidorID.json``: a video's path by its number.
        task: ``choices``: multiple choice; ``open``: short answers.
    """
    video_of = _videos(images)
    paths = json_of(Path(mapping))

    def item_of(row: Any, number: int) -> Item:
        video, kind = text_in(row["video"], "video", numbers=True), text_in(row["type"], "type")
        choices = tuple(text_in(row[f"a{n}"], "choice").strip() for n in range(5)) if task == "choices" else ()
        if task == "choices":
            right: tuple[str, ...] = (choices[_index(row["answer"], 5)],)
        else:
            others = [row[name] for name in ("additional_ref_answer",) if not absent(row.get(name))]
            right = reference_answers([row["answer"], *others])
        question = text_in(row["question"], "question").strip()
        return Item(f"{video}/{row['qid']}", (video_of(paths[video]),), right, question, kind, choices)

    return rows.each(separated_rows(Path(annotations), ","), item_of, _NEXT_QA)


@reader
def video_mme(rows: Reading, *, annotations: str, images: str) -> list[Item]:
    """Read Video-MME; the kind is the video's duration: short, medium or long.

    Args:
        rows: the reading.
        annotations: a parquet file: ``question_id, videoID, question, options, answer, duration``.
        images: the folder of the videos, ``VIDEO_ID.mp4``.
    """
    video_of = _videos(images)
    columns = ["question_id", "videoID", "question", "options", "answer", "duration"]

    def item_of(row: Any, number: int) -> Item:
        choices = tuple(_unlettered(option, n) for n, option in enumerate(row["options"]))
        right = choices[_OPTIONS.index(text_in(row["answer"], "answer").strip().upper())]
        question, video = text_in(row["question"], "question").strip(), video_of(row["videoID"])
        return Item(identifier(row["question_id"]), (video,), (right,), question, row["duration"], choices)

    contents = enumerate(parquet_rows(Path(annotations), columns))
    records = (Record(f"{annotations}, row {n}", n, lambda row=row: row) for n, row in contents)  # type: ignore[misc]
    return rows.each(records, item_of, _VIDEO_MME)


@reader
def mvbench(rows: Reading, *, annotations: str, images: str) -> list[Item]:
    """Read MVBench; the kind is the task, named by the file.

    Args:
        rows: the reading.
        annotations: a file, or a folder of files ``TASK.json``: ``[{video, question, candidates, answer}]``; with
            ``start`` and ``end``, in seconds, the question is about that part of the video.
        images: the folder of the videos, which are sought in it and its subfolders by the path that a row names. Tasks
            whose videos are folders of frames are not read.
    """
    path = Path(annotations)
    items: list[Item] = []
    known = _files_below(images)
    for table in files_in(path, ".json") if os.path.isdir(path) else [path]:
        kind = stem_of(table)

        def item_of(row: Any, number: int, kind: str = kind) -> Item:
            file = _below(known, images, text_in(row["video"], "video"))
            part = (float(row["start"]), float(row["end"])) if not absent(row.get("start")) else (0.0, None)
            choices = tuple(text_in(option, "candidate", numbers=True) for option in row["candidates"])
            right = text_in(row["answer"], "answer", numbers=True)
            if right not in choices:
                raise MLLMError(f"the answer {right!r} is none of the candidates. Correct it.")
            question = text_in(row["question"], "question").strip()
            return Item(f"{kind}/{number - 1}", (VideoFile(file, *part),), (right,), question, kind, choices)

        items += rows.each(records_of(table), item_of, _MVBENCH)
    return items


def _answer(row: Any) -> tuple[str, ...]:
    return reference_answers([row["answer"]])


def _index(value: Any, number: int) -> int:
    index = int(value)
    if not 0 <= index < number:
        raise MLLMError(f"the right choice is {index}; expected 0 to {number - 1}. Correct it.")
    return index


def _unlettered(option: Any, number: int) -> str:
    """Return an option without the letter that stands before it."""
    return text_in(option, "option").strip().removeprefix(f"{_OPTIONS[number]}.").strip()


def _mapped(file: str) -> dict[str, str]:
    """Return the names of MSVD's videos by their numbers, ``vid1``."""
    lines = [line.split() for line in text_of(Path(file)).splitlines() if line.strip()]
    if any(len(line) != 2 for line in lines):
        raise MLLMError(f"{file} has an unexpected form: expected lines of a video's name and number. Correct it.")
    return {number: name for name, number in lines}


def _videos(folder: str) -> Callable[..., VideoFile]:
    """Return a function from the possible names of a video, without their endings, to its file in a folder."""

    def video_of(*names: str) -> VideoFile:
        files = [inside(folder, f"{name}{suffix}") for name in names for suffix in sorted(SUFFIXES)]
        there = [file for file in files if os.path.isfile(file)]
        return VideoFile(there[0] if there else inside(folder, f"{names[0]}.mp4"))

    return video_of


def _files_below(folder: str) -> dict[str, list[Path]]:
    """Return the videos of a folder and its subfolders by their names."""
    files: dict[str, list[Path]] = {}
    for file in sorted(Path(folder).rglob("*")):
        if suffix_of(file) in {*SUFFIXES, ".gif"}:
            files.setdefault(file.name, []).append(file)
    return files


def _below(known: dict[str, list[Path]], folder: str, name: str) -> Path:
    """Return the one file whose path ends as a row names it, or where it would be if it is missing."""
    direct = inside(folder, name)
    ends = [file for file in known.get(direct.name, ()) if file.as_posix().endswith(f"/{name}")]
    if direct in ends or len(ends) != 1:
        return direct
    return ends[0]
