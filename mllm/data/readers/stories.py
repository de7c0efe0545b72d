"""Readers of stories and dialogues: words, with pictures between, of a picture that is to be found or asked about.

What is told stands in an item's ``document``; its images are all candidates, and an answer is the place of one, counted
from 0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from mllm.data.files import form, inside, json_of, present
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.media.images import SUFFIXES, ImageFile

TOLD = {"caption": "1 caption", "captions": "all captions", "story": "all captions and images"}
STEPS = 20  # that relevance is told in: annotators' shares, as repetitions of an answer


def vist(
    *,
    annotations: str,
    images: str,
    told: Sequence[Literal["caption", "captions", "story"]] = ("caption", "captions", "story"),
) -> list[Item]:
    """Read VIST's stories in sequence: the last picture of each is to be found among all (FROMAGe, arXiv:2301.13823).

    The kind is how much is told. A story of which a picture is not there is left out: the pictures are Flickr's, which
    loses some.

    Args:
        annotations: ``val.story-in-sequence.json``: ``annotations``, each a list of one ``{story_id, photo_flickr_id,
            worker_arranged_photo_order, text}``.
        images: the folder with ``PHOTO_FLICKR_ID.jpg``, or another ending.
        told: "caption", the last one; "captions", all; "story", all with the pictures before the last between them.
    """
    if wrong := [one for one in told if one not in TOLD]:
        raise MLLMError(f"vist cannot be told {wrong[0]!r}: expected some of {', '.join(TOLD)}.")
    files = {path.stem: path for path in sorted(Path(images).glob("*")) if path.suffix.lower() in SUFFIXES}
    stories: dict[str, list[tuple[int, str, str]]] = defaultdict(list)
    with form(annotations, "{annotations: [[{story_id, photo_flickr_id, worker_arranged_photo_order, text}]]}"):
        for (row,) in json_of(Path(annotations))["annotations"]:
            scene = int(row["worker_arranged_photo_order"]), str(row["photo_flickr_id"]), str(row["text"])
            stories[str(row["story_id"])].append(scene)
    whole = {name: sorted(scenes) for name, scenes in stories.items() if all(photo in files for _, photo, _ in scenes)}
    if not whole:
        raise MLLMError(f"{images} has all pictures of none of the {len(stories)} stories in {annotations}.")
    numbers: dict[str, int] = {}
    for _, photo, _ in (scene for scenes in whole.values() for scene in scenes):
        numbers.setdefault(photo, len(numbers))
    pictures = tuple(ImageFile(files[photo]) for photo in numbers)
    items = []
    for much in told:
        for name, scenes in whole.items():
            document = _told(much, [text for *_, text in scenes], [pictures[numbers[photo]] for _, photo, _ in scenes])
            answer = str(numbers[scenes[-1][1]])
            items.append(Item(f"{name}/{much}", pictures, (answer,), kind=TOLD[much], document=document))
    return items


def _told(much: str, texts: Sequence[str], pictures: Sequence[ImageFile]) -> tuple[str | ImageFile, ...]:
    if much == "caption":
        return (texts[-1],)
    if much == "captions":
        return (" ".join(texts),)
    between = [piece for pair in zip(texts, pictures, strict=True) for piece in pair]
    return tuple(between[:-1])


def visdial(
    *,
    annotations: str,
    images: str,
    find: Literal["images", "answers", "relevant"],
    dense: str | None = None,
    rounds: Sequence[int] = (10,),
) -> list[Item]:
    """Read VisDial 1.0 (arXiv:1611.08669): a dialogue's picture among all, or an answer among a question's 100.

    Args:
        annotations: ``visdial_1.0_val.json``.
        images: the folder with ``VisualDialog_val2018_000000000042.jpg``.
        find: "images": a document ``Q: ...? A: ...`` of the first rounds, whose number the kind tells; "answers": each
            question behind the rounds before it, the choices its options; "relevant": those of the dense annotations,
            where each option is told as often as it is relevant, of 20.
        dense: ``visdial_1.0_val_dense_annotations.json``, whose rounds are counted from 1; for "relevant".
        rounds: of a dialogue that are told, for "images".

    Raises:
        MLLMError: another form, or "relevant" without dense annotations.
    """
    if find == "relevant" and dense is None:
        raise MLLMError("visdial finds relevant answers by the dense annotations: give dense.")
    with form(annotations, "{split, data: {questions, answers, dialogs: [{image_id, dialog: [{question, answer}]}]}}"):
        whole = json_of(Path(annotations))
        data, split = whole["data"], whole["split"]
        dialogs = data["dialogs"]
        names = [f"VisualDialog_{split}_{int(dialog['image_id']):012d}.jpg" for dialog in dialogs]
        pictures = tuple(ImageFile(inside(images, name, annotations)) for name in names)
        if find == "images":
            return present(_dialogues(data, pictures, rounds), annotations)
        questions = {item.id: item for item in _questions(data, pictures)}
    if dense is None or find == "answers":
        return present(list(questions.values()), annotations)
    with form(dense, "[{image_id, round_id, gt_relevance}] of the same dialogues"):
        found = [_relevant(questions[f"{row['image_id']}/{row['round_id']}"], row) for row in json_of(Path(dense))]
    return present(found, dense)


def _dialogues(data: Any, pictures: tuple[ImageFile, ...], rounds: Sequence[int]) -> list[Item]:
    items = []
    for count in rounds:
        for place, dialog in enumerate(data["dialogs"]):
            told = (_words(data, one) for one in dialog["dialog"][:count])
            text = " ".join(f"Q: {question}? A: {answer}." for question, answer in told)
            kind = f"{count} round{'s' if count > 1 else ''}"
            name = f"{dialog['image_id']}/{count}"
            items.append(Item(name, pictures, (str(place),), kind=kind, document=(text,)))
    return items


def _questions(data: Any, pictures: Sequence[ImageFile]) -> list[Item]:
    items = []
    for dialog, picture in zip(data["dialogs"], pictures, strict=True):
        before = ""
        for number, one in enumerate(dialog["dialog"], start=1):
            question, answer = _words(data, one)
            asked = f"{before}Q: {question}?"
            options = tuple(data["answers"][option] for option in one["answer_options"])
            name = f"{dialog['image_id']}/{number}"
            items.append(Item(name, (picture,), (str(one["gt_index"]),), question=asked, choices=options))
            before = f"{asked}\nA: {answer}\n"
    return items


def _words(data: Any, one: Any) -> tuple[str, str]:
    """Return a round's question, which is told without its mark, and its answer."""
    return data["questions"][one["question"]], data["answers"][one["answer"]]


def _relevant(item: Item, row: Any) -> Item:
    """Return a question with each option's place told as often as it is relevant."""
    shares = [round(STEPS * float(share)) for share in row["gt_relevance"]]
    if len(shares) != len(item.choices):
        raise ValueError(f"{len(shares)} options of {item.id}")
    places = tuple(str(place) for place, times in enumerate(shares) for _ in range(times))
    return Item(item.id, item.images, places, question=item.question, choices=item.choices)
