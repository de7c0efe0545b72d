"""Read questions with answers in the file formats that their authors publish."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mllm.data.files import entries_of, files_in, inside, records_of, rows_of, stem_of
from mllm.data.items import Item
from mllm.data.readers.captions import check_splits
from mllm.data.reading import Reading, reader
from mllm.data.records import Derived, Record
from mllm.data.values import identifier, reference_answers, text_in
from mllm.errors import MLLMError
from mllm.media.images import ImageFile

_QUESTIONS = "questions: [{question_id, image_id, question}], and name: a pattern for a number"
_ANNOTATIONS = "annotations: [{question_id, answers: [{answer}]}]"
_VIZWIZ = "[{image, question, answers: [{answer}]}]"
_AOKVQA = "[{question_id, image_id, question, choices, correct_choice_idx, direct_answers}]"
_GQA = "{id: {imageId, question, answer, types: {structural}}}"
_TEXTVQA = "data: [{question_id, image_id, question, answers}]"
_SCIENCEQA = "{id: {question, choices, answer, image, split}}"
_POPE = "lines of {question_id, image, text, label}"
_SNLI_VE = "lines of {Flickr30K_ID, pairID, sentence2, gold_label}"
_MINI_IMAGENET = "[{image_1, caption_1, ..., question_image, question, answer}]"


@reader
def vqa(rows: Reading, *, questions: str, images: str, annotations: str | None = None, name: str) -> Sequence[Item]:
    """Read VQAv2 or OK-VQA; the kind is the answer's type (``yes/no``, ``number``, ``other``).

    Args:
        rows: the reading.
        questions: ``questions: [{question_id, image_id, question}]``.
        images: the folder of the image files.
        annotations: ``annotations: [{question_id, answers: [{answer}], answer_type}]``; None: a test split.
        name: the pattern of the image files' names, such as ``COCO_val2014_{:012d}.jpg``.

    Raises:
        MLLMError: a file is missing or has an unexpected form, a question has no annotation or vice versa, or image
            files are missing.
    """

    listed = rows_of(questions, _QUESTIONS, "questions")
    asked = rows.by_id(rows.each(listed, _numbered, _QUESTIONS), f"{questions}: the question_id")
    labels = listed if annotations is None else rows_of(annotations, _ANNOTATIONS, "annotations")
    answered = asked
    if annotations is not None:
        pairs = rows.each(labels, _numbered, _ANNOTATIONS, count=False)
        answered = rows.by_id(pairs, f"{annotations}: the question_id")
    for key in sorted(asked.keys() ^ answered.keys()):
        rows.bad(f"{questions} and {annotations}: the question_id {key} is in one of them only. Give two files of the "
                 "same split.")  # fmt: skip

    def item_of(match: tuple[str, Any, Any], number: int) -> Item:
        key, row, labelled = match
        file = ImageFile(inside(images, name.format(row["image_id"])))
        answers = [answer["answer"] for answer in labelled["answers"]] if labelled else None
        right = () if answers is None else reference_answers(answers)
        return Item(key, (file,), right, text_in(row["question"], "question"), str(labelled.get("answer_type", "")))

    label = f"{annotations or questions}, question_id"
    places = ((key, row, answered.get(key)) for key, row in asked.items())
    known = [(key, row, labelled) for key, row, labelled in places if row is not None and labelled is not None]

    def matched(index: int) -> Record:
        key, row, labelled = known[index]
        answers = {} if annotations is None else labels.at(labelled).load()
        return Record(f"{label} {key}", index + 1, lambda: (key, listed.at(row).load(), answers))

    matches = Derived(len(known), matched, listed, labels)
    return rows.items(matches, item_of, f"{_QUESTIONS}; {_ANNOTATIONS}", count=False)


def _numbered(row: Any, number: int) -> tuple[str, int]:
    """Return the id of a row's question, and the row's index."""
    return identifier(row["question_id"]), number - 1


@reader
def vizwiz(rows: Reading, *, annotations: str, images: str) -> Sequence[Item]:
    """Read VizWiz's questions: ``[{image, question, answers: [{answer}], answer_type}]``."""

    def item_of(row: Any, number: int) -> Item:
        answers = row.get("answers", [])
        if not isinstance(answers, list):
            raise MLLMError(f"the answers are {str(answers)[:60]!r}; expected a list. Correct them.")
        answers = [answer["answer"] for answer in answers]
        return _item(row["image"], images, row["image"], row["question"], answers, row.get("answer_type", ""))

    return rows.items(rows_of(annotations, _VIZWIZ), item_of, _VIZWIZ)


@reader
def aokvqa(
    rows: Reading, *, annotations: str, images: str, task: Literal["direct", "choices"] = "direct"
) -> Sequence[Item]:
    """Read A-OKVQA: ``[{question_id, image_id, question, choices, correct_choice_idx, direct_answers}]``.

    Args:
        rows: the reading.
        annotations: ``aokvqa_v1p0_val.json``.
        images: the folder of COCO's images of 2017, ``000000000139.jpg``.
        task: ``direct`` (without questions marked ``difficult_direct_answer``, as its authors evaluate) or ``choices``.
    """

    def item_of(row: Any, number: int) -> Item | None:
        if task == "direct" and row.get("difficult_direct_answer"):
            return None
        direct = task == "direct"
        right = row["direct_answers"] if direct else [_choice(row["choices"], row["correct_choice_idx"])]
        file = f"{row['image_id']:012d}.jpg"
        return _item(row["question_id"], images, file, row["question"], right, choices=[] if direct else row["choices"])

    return rows.items(rows_of(annotations, _AOKVQA), item_of, _AOKVQA)


@reader
def gqa(rows: Reading, *, annotations: str, images: str) -> Sequence[Item]:
    """Read GQA: ``{id: {imageId, question, answer, types: {structural}}}``; the kind is the structural type."""

    def item_of(entry: tuple[str, Any], number: int) -> Item:
        key, row = entry
        kind = row.get("types", {}).get("structural", "")
        return _item(key, images, f"{row['imageId']}.jpg", row["question"], [row["answer"]], kind)

    return rows.items(entries_of(annotations, _GQA), item_of, _GQA)


@reader
def textvqa(rows: Reading, *, annotations: str, images: str) -> Sequence[Item]:
    """Read TextVQA: ``data: [{question_id, image_id, question, answers}]``, with images ``IMAGE_ID.jpg``."""

    def item_of(row: Any, number: int) -> Item:
        return _item(row["question_id"], images, f"{row['image_id']}.jpg", row["question"], row.get("answers", []))

    return rows.items(rows_of(annotations, _TEXTVQA, "data"), item_of, _TEXTVQA)


@reader
def scienceqa(rows: Reading, *, problems: str, images: str, split: str = "test") -> Sequence[Item]:
    """Read ScienceQA's problems that have an image; the kind is the subject.

    Args:
        rows: the reading.
        problems: ``problems.json``: ``{id: {question, hint, choices, answer, image, split, subject}}``.
        images: the folder of the image files ``SPLIT/ID/image.png``.
        split: ``train``, ``val`` or ``test``.
    """
    known: dict[str, None] = {}

    def item_of(entry: tuple[str, Any], number: int) -> Item | None:
        key, row = entry
        known[text_in(row["split"], "split")] = None
        if row["split"] != split or not row["image"]:
            return None
        asked = text_in(row["question"], "question").strip()
        question = "\n".join(filter(None, [text_in(row.get("hint"), "hint", empty=True).strip(), asked]))
        file, kind = f"{split}/{key}/{row['image']}", row.get("subject", "")
        return _item(key, images, file, question, [_choice(row["choices"], row["answer"])], kind, row["choices"])

    items = rows.items(entries_of(problems, _SCIENCEQA), item_of, _SCIENCEQA)
    check_splits([split], known, problems)
    return items


@reader
def pope(rows: Reading, *, annotations: str, images: str) -> Sequence[Item]:
    """Read POPE's questions; the kind is the sampling named by the file: random, popular or adversarial.

    Args:
        rows: the reading.
        annotations: a file of JSON lines ``{question_id, image, text, label}``, or a folder of such ``*.json`` files.
        images: the folder of the image files.
    """

    def item_of(row: Any, number: int, kind: str) -> Item:
        name = f"{kind}/{identifier(row['question_id'])}"
        return _item(name, images, row["image"], row["text"], [row["label"]], kind)

    path = Path(annotations)
    files = files_in(path, ".json", ".jsonl") if os.path.isdir(path) else [path]
    kinds = [stem_of(file).rpartition("_")[2] for file in files]
    return rows.joined(
        [
            rows.items(records_of(file), partial(item_of, kind=kind), _POPE)
            for file, kind in zip(files, kinds, strict=True)
        ]
    )


_VERDICTS = {"entailment": "yes", "neutral": "maybe", "contradiction": "no"}


@reader
def snli_ve(rows: Reading, *, annotations: str, images: str) -> Sequence[Item]:
    """Read SNLI-VE: whether the image entails a sentence (yes: entailment, maybe: neutral, no: contradiction).

    Args:
        rows: the reading.
        annotations: lines of ``{Flickr30K_ID, pairID, sentence2, gold_label}``.
        images: the folder of Flickr30k's images, ``FLICKR30K_ID.jpg``.
    """

    def item_of(row: Any, number: int) -> Item:
        question = f'Does the image show that "{text_in(row["sentence2"], "sentence2").strip()}"?'
        right, kind = _VERDICTS[row["gold_label"]], row["gold_label"]
        name, file = row.get("pairID", number - 1), f"{row['Flickr30K_ID']}.jpg"
        return _item(name, images, file, question, [right], kind, list(_VERDICTS.values()))

    return rows.items(records_of(Path(annotations)), item_of, _SNLI_VE)


@reader
def open_ended_mini_imagenet(rows: Reading, *, annotations: str, images: str) -> Sequence[Item]:
    """Read open-ended miniImageNet (Tsimpoukelli et al. 2021): new names, defined by the shots before the question.

    Real-Name miniImageNet, Fast-VQA and Real-Fast-VQA of the same authors have this form, too.

    Args:
        rows: the reading.
        annotations: ``[{image_1, caption_1, image_2, caption_2, ..., question_image, question, answer}]``.
        images: the folder of the image files; if there is none, they lie beside the annotations, as published.
    """
    images = images if os.path.isdir(images) else os.path.dirname(annotations)

    def shot_of(row: Any, name: str, shot: int) -> Item:
        image = ImageFile(inside(images, row[f"image_{shot}"]))
        return Item(f"{name}/{shot}", (image,), (text_in(row[f"caption_{shot}"], "caption"),), "")

    def item_of(row: Any, number: int) -> Item:
        name, count = str(number - 1), sum(key.startswith("image_") for key in row)
        shots = tuple(shot_of(row, name, shot) for shot in range(1, count + 1))
        file = ImageFile(inside(images, row["question_image"]))
        answer = text_in(row["answer"], "answer", numbers=True)
        return Item(name, (file,), (answer,), text_in(row["question"], "question"), shots=shots)

    return rows.items(rows_of(annotations, _MINI_IMAGENET), item_of, _MINI_IMAGENET)


def _item(
    key: Any,
    folder: str,
    file: str,
    question: Any,
    answers: Sequence[Any],
    kind: Any = "",
    choices: Sequence[Any] = (),
) -> Item:
    """Return a question about one image; one without ``answers`` is of a test split."""
    image = ImageFile(inside(folder, file))
    right = reference_answers(answers) if answers != [] else ()
    asked = text_in(question, "question").strip()
    return Item(identifier(key), (image,), right, asked, str(kind), tuple(map(_option, choices)))


def _option(value: Any) -> str:
    return text_in(value, "choice", numbers=True)


def _choice(choices: Any, index: Any) -> Any:
    """Return the choice at an index that counts from 0."""
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(choices):
        raise MLLMError(f"the right choice is {index!r}; expected 0 to {len(choices) - 1}. Correct it.")
    return choices[index]
