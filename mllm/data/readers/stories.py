"""Read stories and dialogues for retrieval: texts, some interleaved with images, that are queries for an image.

The query is an item's ``document``; its images are all candidates, and an answer is the index of one, counted from 0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from mllm.data.files import images_in, inside, json_of, rows_in, rows_of
from mllm.data.items import Item
from mllm.data.reading import Reading, reader
from mllm.data.records import FORM_ERRORS, Record
from mllm.data.values import identifier, text_in
from mllm.errors import MLLMError
from mllm.media.images import ImageFile

TOLD = {"caption": "1 caption", "captions": "all captions", "story": "all captions and images"}
_VIST = "{annotations: [[{story_id, photo_flickr_id, worker_arranged_photo_order, text}]]}"
_VISDIAL = "{split, data: {questions, answers, dialogs: [{image_id, dialog: [{question, answer}]}]}}"
_DENSE = "[{image_id, round_id, gt_relevance}] of the same dialogues"
STEPS = 20  # relevance, the share of annotators, is expressed as 0 to 20 repetitions of an answer


@reader
def vist(
    rows: Reading,
    *,
    annotations: str,
    images: str,
    told: Sequence[Literal["caption", "captions", "story"]] = ("caption", "captions", "story"),
) -> list[Item]:
    """Read VIST's stories to retrieve the last image of each among all images (FROMAGe, arXiv:2301.13823).

    The kind is the content of the query. Stories with missing images are left out and counted, since some are no longer
    on Flickr; ``missing`` changes nothing.

    Args:
        rows: the reading.
        annotations: ``val.story-in-sequence.json``: ``annotations``, each a list of one ``{story_id, photo_flickr_id,
            worker_arranged_photo_order, text}``.
        images: the folder of the image files ``PHOTO_FLICKR_ID.jpg``, or with another suffix.
        told: the content of the query: "caption", the last one; "captions", all; "story", all captions interleaved with
            the images before the last.
    """
    if wrong := [content for content in told if content not in TOLD]:
        raise MLLMError(
            f"vist does not support told={wrong[0]!r}: expected some of {', '.join(TOLD)}. Choose among them."
        )
    files = {path.stem: path for path in images_in(Path(images))}
    stories: dict[str, list[tuple[int, str, str]]] = defaultdict(list)

    def scene_of(row: Any, number: int) -> tuple[str, tuple[int, str, str]]:
        (scene,) = row
        order, photo = int(scene["worker_arranged_photo_order"]), identifier(scene["photo_flickr_id"])
        return identifier(scene["story_id"]), (order, photo, text_in(scene["text"], "text"))

    listed = rows_of(annotations, _VIST, "annotations")
    for name, scene in rows.each(listed, scene_of, _VIST):
        stories[name].append(scene)
    complete = {
        name: sorted(scenes) for name, scenes in stories.items() if all(photo in files for _, photo, _ in scenes)
    }
    if len(complete) < len(stories):
        rows.report.counts["stories with a missing image"] = len(stories) - len(complete)
    if not complete:
        raise MLLMError(
            f"{images} has all images of none of the {len(stories)} stories in {annotations}; expected at least one. "
            "Set images to the folder of the images."
        )
    numbers: dict[str, int] = {}
    for _, photo, _ in (scene for scenes in complete.values() for scene in scenes):
        numbers.setdefault(photo, len(numbers))
    candidates = tuple(ImageFile(files[photo]) for photo in numbers)
    items = []
    for content in told:
        for name, scenes in complete.items():
            photos = [candidates[numbers[photo]] for _, photo, _ in scenes]
            document = _query(content, [text for *_, text in scenes], photos)
            answer = str(numbers[scenes[-1][1]])
            items.append(Item(f"{name}/{content}", candidates, (answer,), kind=TOLD[content], document=document))
    return items


def _query(content: str, texts: Sequence[str], images: Sequence[ImageFile]) -> tuple[str | ImageFile, ...]:
    if content == "caption":
        return (texts[-1],)
    if content == "captions":
        return (" ".join(texts),)
    interleaved = [piece for pair in zip(texts, images, strict=True) for piece in pair]
    return tuple(interleaved[:-1])


@reader
def visdial(
    rows: Reading,
    *,
    annotations: str,
    images: str,
    find: Literal["images", "answers", "relevant"],
    dense: str | None = None,
    rounds: Sequence[int] = (10,),
) -> list[Item]:
    """Read VisDial 1.0 (arXiv:1611.08669) to retrieve a dialogue's image among all, or an answer among 100 options.

    Args:
        rows: the reading.
        annotations: ``visdial_1.0_val.json``.
        images: the folder of the image files ``VisualDialog_val2018_000000000042.jpg``.
        find: "images": the query is a document ``Q: ...? A: ...`` of the first rounds, and the kind is their number;
            "answers": each question after the rounds before it, with its options as choices; "relevant": the questions
            of the dense annotations, where an option is repeated in the answers by its relevance, 0 to 20 times.
        dense: ``visdial_1.0_val_dense_annotations.json``, whose rounds are counted from 1; for "relevant".
        rounds: the numbers of rounds in a query, for "images".

    Raises:
        MLLMError: a file has an unexpected form, or "relevant" without dense annotations.
    """
    if find == "relevant" and dense is None:
        raise MLLMError("visdial: find is 'relevant', which needs the dense annotations. Set dense to their file.")
    content = json_of(Path(annotations))
    try:
        data, split = content["data"], content["split"]
        dialogs = rows_in(data, annotations, _VISDIAL, "dialogs")
    except FORM_ERRORS as error:
        raise MLLMError(f"{annotations} has an unexpected form ({error!r}): expected {_VISDIAL}.") from None

    def image_of(dialog: Any, number: int) -> tuple[Any, ImageFile]:
        name = f"VisualDialog_{split}_{int(dialog['image_id']):012d}.jpg"
        return dialog, ImageFile(inside(images, name))

    pairs = [pair for pair in rows.each(dialogs, image_of, _VISDIAL) if rows.available(pair[1])]
    numbered = [Record(f"{annotations}, dialogs", number, lambda number=number: number) for number in range(len(pairs))]  # type: ignore[misc]
    if find == "images":
        sources = tuple(image for _, image in pairs)
        return [
            item
            for count in rounds
            for item in rows.each(
                numbered,
                lambda index, _, count=count: _dialogue(data, pairs[index][0], index, sources, count),  # type: ignore[misc]
                _VISDIAL,
                count=False,
            )
        ]
    asked = rows.each(numbered, lambda index, _: _questions(data, *pairs[index]), _VISDIAL, count=False)
    questions = {item.id: item for items in asked for item in items}
    if dense is None or find == "answers":
        return list(questions.values())

    def relevant(row: Any, number: int) -> Item:
        return _relevant(questions[f"{row['image_id']}/{row['round_id']}"], row)

    return rows.each(rows_of(dense, _DENSE), relevant, _DENSE)


def _dialogue(data: Any, dialog: Any, index: int, images: tuple[ImageFile, ...], count: int) -> Item:
    """Return the query of a dialogue's first rounds, which looks for one of the images."""
    turns = (_round(data, turn) for turn in dialog["dialog"][:count])
    text = " ".join(f"Q: {question}? A: {answer}." for question, answer in turns)
    kind = f"{count} round{'s' if count > 1 else ''}"
    return Item(f"{dialog['image_id']}/{count}", images, (str(index),), kind=kind, document=(text,))


def _questions(data: Any, dialog: Any, image: ImageFile) -> list[Item]:
    """Return each question of a dialogue after the rounds before it."""
    items, context = [], ""
    for number, turn in enumerate(dialog["dialog"], start=1):
        question, answer = _round(data, turn)
        prompt = f"{context}Q: {question}?"
        options = tuple(data["answers"][option] for option in turn["answer_options"])
        name = f"{dialog['image_id']}/{number}"
        items.append(Item(name, (image,), (str(turn["gt_index"]),), question=prompt, choices=options))
        context = f"{prompt}\nA: {answer}\n"
    return items


def _round(data: Any, turn: Any) -> tuple[str, str]:
    """Return the question of a round, which has no question mark, and its answer."""
    return data["questions"][turn["question"]], data["answers"][turn["answer"]]


def _relevant(item: Item, row: Any) -> Item:
    """Return a question whose answers repeat the index of each option by its relevance."""
    shares = [round(STEPS * float(share)) for share in row["gt_relevance"]]
    if len(shares) != len(item.choices):
        raise ValueError(f"{len(shares)} values of gt_relevance for {len(item.choices)} options of {item.id}")
    answers = tuple(str(index) for index, times in enumerate(shares) for _ in range(times))
    return Item(item.id, item.images, answers, question=item.question, choices=item.choices)
