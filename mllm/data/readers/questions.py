"""Read questions with answers in the file formats that their authors publish."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mllm.data.files import check_present, expect_form, inside, json_lines, json_of, some
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.media.images import ImageFile


def vqa(*, questions: str, images: str, annotations: str | None = None, name: str) -> list[Item]:
    """Read VQAv2 or OK-VQA; the kind is the answer's type (``yes/no``, ``number``, ``other``).

    Args:
        questions: ``questions: [{question_id, image_id, question}]``.
        images: the folder of the image files.
        annotations: ``annotations: [{question_id, answers: [{answer}], answer_type}]``; None: a test split.
        name: the pattern of the image files' names, such as ``COCO_val2014_{:012d}.jpg``.

    Raises:
        MLLMError: a file is missing or has an unexpected form, a question has no annotation or vice versa, or image
            files are missing.
    """
    content = json_of(Path(questions))
    with expect_form(questions, "questions: [{question_id, image_id, question}], and name: a pattern for a number"):
        rows = {row["question_id"]: row for row in content["questions"]}
        files = {key: inside(images, name.format(row["image_id"]), questions) for key, row in rows.items()}
        if len(rows) < len(content["questions"]):
            raise MLLMError(f"{questions}: a question_id occurs twice; expected unique ids. Remove one of the rows.")
    answered: dict[Any, Any] = {key: {"answers": []} for key in rows}
    if annotations is not None:
        labels = json_of(Path(annotations))
        with expect_form(annotations, "annotations: [{question_id, answers: [{answer}]}]"):
            answered = {row["question_id"]: row for row in labels["annotations"]}
    unmatched = sorted(map(str, rows.keys() ^ answered.keys()))
    if unmatched:
        raise MLLMError(
            f"{questions} and {annotations}: question_ids that are in one of them only: {some(unmatched)}. Give two "
            "files of the same split."
        )
    with expect_form(annotations or questions, "annotations: [{question_id, answers: [{answer}]}]"):
        items = [
            Item(
                str(key),
                (ImageFile(files[key]),),
                tuple(str(answer["answer"]) for answer in answered[key]["answers"]),
                str(row["question"]),
                kind=str(answered[key].get("answer_type", "")),
            )
            for key, row in rows.items()
        ]
    return check_present(items, questions)


def vizwiz(*, annotations: str, images: str) -> list[Item]:
    """Read VizWiz's questions: ``[{image, question, answers: [{answer}], answer_type}]``."""
    content = json_of(Path(annotations))
    with expect_form(annotations, "[{image, question, answers: [{answer}]}]"):
        items = [
            _item(
                row["image"],
                images,
                row["image"],
                row["question"],
                _answers(row),
                annotations,
                row.get("answer_type", ""),
            )
            for row in content
        ]
    return check_present(items, annotations)


def aokvqa(*, annotations: str, images: str, task: Literal["direct", "choices"] = "direct") -> list[Item]:
    """Read A-OKVQA: ``[{question_id, image_id, question, choices, correct_choice_idx, direct_answers}]``.

    Args:
        annotations: ``aokvqa_v1p0_val.json``.
        images: the folder of COCO's images of 2017, ``000000000139.jpg``.
        task: ``direct`` (without questions marked ``difficult_direct_answer``, as its authors evaluate) or ``choices``.
    """
    content = json_of(Path(annotations))
    items = []
    with expect_form(annotations, "[{question_id, image_id, question, choices, correct_choice_idx, direct_answers}]"):
        for row in content:
            if task == "direct" and row.get("difficult_direct_answer"):
                continue
            direct = task == "direct"
            right = row["direct_answers"] if direct else [row["choices"][row["correct_choice_idx"]]]
            choices = () if direct else tuple(row["choices"])
            file = f"{row['image_id']:012d}.jpg"
            items.append(_item(row["question_id"], images, file, row["question"], right, annotations, choices=choices))
    return check_present(items, annotations)


def gqa(*, annotations: str, images: str) -> list[Item]:
    """Read GQA: ``{id: {imageId, question, answer, types: {structural}}}``; the kind is the structural type."""
    content = json_of(Path(annotations))
    with expect_form(annotations, "{id: {imageId, question, answer, types: {structural}}}"):
        items = [
            _item(
                key,
                images,
                f"{row['imageId']}.jpg",
                row["question"],
                [row["answer"]],
                annotations,
                row.get("types", {}).get("structural", ""),
            )
            for key, row in content.items()
        ]
    return check_present(items, annotations)


def textvqa(*, annotations: str, images: str) -> list[Item]:
    """Read TextVQA: ``data: [{question_id, image_id, question, answers}]``, with images ``IMAGE_ID.jpg``."""
    content = json_of(Path(annotations))
    with expect_form(annotations, "data: [{question_id, image_id, question, answers}]"):
        items = [
            _item(
                row["question_id"],
                images,
                f"{row['image_id']}.jpg",
                row["question"],
                row.get("answers", []),
                annotations,
            )
            for row in content["data"]
        ]
    return check_present(items, annotations)


def scienceqa(*, problems: str, images: str, split: str = "test") -> list[Item]:
    """Read ScienceQA's problems that have an image; the kind is the subject.

    Args:
        problems: ``problems.json``: ``{id: {question, hint, choices, answer, image, split, subject}}``.
        images: the folder of the image files ``SPLIT/ID/image.png``.
        split: ``train``, ``val`` or ``test``.
    """
    content = json_of(Path(problems))
    items = []
    with expect_form(problems, "{id: {question, choices, answer, image, split}}"):
        for key, row in content.items():
            if row["split"] == split and row["image"]:
                question = "\n".join(filter(None, [row.get("hint", "").strip(), row["question"].strip()]))
                right, file = row["choices"][row["answer"]], f"{split}/{key}/{row['image']}"
                kind = row.get("subject", "")
                items.append(_item(key, images, file, question, [right], problems, kind, tuple(row["choices"])))
    return check_present(items, f"{problems}, split {split}")


def pope(*, annotations: str, images: str) -> list[Item]:
    """Read POPE's questions; the kind is the sampling named by the file: random, popular or adversarial.

    Args:
        annotations: a file of JSON lines ``{question_id, image, text, label}``, or a folder of such ``*.json`` files.
        images: the folder of the image files.
    """
    path = Path(annotations)
    files = sorted(path.glob("*.json*")) if path.is_dir() else [path]
    items = []
    for file in files:
        kind = file.stem.rpartition("_")[2]
        with expect_form(file, "lines of {question_id, image, text, label}"):
            for row in json_lines(file):
                name = f"{kind}/{row['question_id']}"
                items.append(_item(name, images, row["image"], row["text"], [row["label"]], file, kind))
    return check_present(items, annotations)


_VERDICTS = {"entailment": "yes", "neutral": "maybe", "contradiction": "no"}


def snli_ve(*, annotations: str, images: str) -> list[Item]:
    """Read SNLI-VE: whether the image entails a sentence (yes: entailment, maybe: neutral, no: contradiction).

    Args:
        annotations: lines of ``{Flickr30K_ID, pairID, sentence2, gold_label}``.
        images: the folder of Flickr30k's images, ``FLICKR30K_ID.jpg``.
    """
    items = []
    with expect_form(annotations, "lines of {Flickr30K_ID, pairID, sentence2, gold_label}"):
        for number, row in enumerate(json_lines(Path(annotations))):
            question = f'Does the image show that "{row["sentence2"].strip()}"?'
            right, kind = _VERDICTS[row["gold_label"]], row["gold_label"]
            file, choices = f"{row['Flickr30K_ID']}.jpg", tuple(_VERDICTS.values())
            name = row.get("pairID", number)
            items.append(_item(name, images, file, question, [right], annotations, kind, choices))
    return check_present(items, annotations)


def open_ended_mini_imagenet(*, annotations: str, images: str) -> list[Item]:
    """Read open-ended miniImageNet (Tsimpoukelli et al. 2021): new names, defined by the shots before the question.

    Args:
        annotations: ``[{image_1, caption_1, image_2, caption_2, ..., question_image, question, answer}]``.
        images: the folder of the image files.
    """
    content = json_of(Path(annotations))
    items = []
    with expect_form(annotations, "[{image_1, caption_1, ..., question_image, question, answer}]"):
        for number, row in enumerate(content):
            count = sum(key.startswith("image_") for key in row)
            shots = tuple(
                Item(
                    f"{number}/{shot}",
                    (ImageFile(inside(images, row[f"image_{shot}"], annotations)),),
                    (str(row[f"caption_{shot}"]),),
                    "",
                )
                for shot in range(1, count + 1)
            )
            file = ImageFile(inside(images, row["question_image"], annotations))
            items.append(Item(str(number), (file,), (str(row["answer"]),), str(row["question"]), shots=shots))
    return check_present(items, annotations)


def _item(
    key: Any,
    folder: str,
    file: str,
    question: Any,
    answers: Any,
    label: Any,
    kind: Any = "",
    choices: tuple[str, ...] = (),
) -> Item:
    image = ImageFile(inside(folder, file, label))
    right = tuple(map(str, answers))
    return Item(str(key), (image,), right, str(question).strip(), str(kind), tuple(map(str, choices)))


def _answers(row: Mapping[str, Any]) -> list[str]:
    return [answer["answer"] for answer in row.get("answers", [])]
