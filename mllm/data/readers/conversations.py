"""Read conversations to train on: LLaVA's JSON and ShareGPT's, messages in the schema of `transformers` or OpenAI."""

from __future__ import annotations

import base64
import binascii
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from mllm.data.files import inside, records_of
from mllm.data.items import Item
from mllm.data.reading import Reading, reader
from mllm.data.values import absent, identifier, listed, text_in
from mllm.errors import MLLMError, near
from mllm.media.images import ImageBytes, ImageSource
from mllm.media.videos import file_of
from mllm.prompts.messages import message, text_part

MARK = "<image>"
VIDEO_MARK = "<video>"  # where a row names a video; some sets write the mark of an image there
_KEYS = ("image", "images", "video", "videos")
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_LLAVA = "{id, image, conversations: [{from: human or gpt, value}]}"
_MESSAGES = "{messages: [{role, content}], images: [...]}"

Turn = tuple[str, str]  # a role, and a text with marks


@reader(unique=False)  # LLaVA's own files have several conversations of one id
def llava(
    rows: Reading, *, path: str, images: str, task: Literal["conversations", "captions"] = "conversations"
) -> Sequence[Item]:
    """Read LLaVA's JSON, a list or lines of ``{id, image, conversations: [{from: human | gpt, value}]}``.

    An item is a conversation. ``image`` (or ``images``, as in ShareGPT's form) is a file, a list of files, or absent
    (text only). A video is named by ``video`` or ``videos``, as in LLaVA-Video, and marked by ``<video>`` or
    ``<image>``. Each ``<image>`` marks where the next image goes; without marks, the images come first.

    Args:
        rows: the reading.
        path: the file.
        images: the folder of the image files.
        task: ``captions`` uses the first answer as the image's caption and discards the question, as in LLaVA's first
            stage.

    Raises:
        MLLMError: the file is missing or has an unexpected form, the numbers of marks and images differ, a conversation
            lacks a question or an answer, or image files are missing.
    """

    def item_of(row: Any, number: int) -> Item:
        turns = [(_role(turn["from"]), _text(turn["value"])) for turn in row["conversations"]]
        if not (absent(row.get("video")) and absent(row.get("videos"))):
            turns = [(role, text.replace(VIDEO_MARK, MARK)) for role, text in turns]
        sources = _listed_images(row, images)
        name = identifier(row.get("id", number - 1))
        return _caption(name, turns, sources) if task == "captions" else _marked(name, turns, sources)

    return rows.items(records_of(Path(path)), item_of, _LLAVA, finish=_unmarked)


def _caption(name: str, turns: Sequence[Turn], images: Sequence[ImageSource]) -> Item:
    if len(images) != 1:
        raise MLLMError(f"{len(images)} images; a caption needs one image. Remove the conversation.")
    _check_marks(turns, images)
    return Item(name, tuple(images), (next(text for role, text in turns if role == "assistant"),))


@reader(unique=False)
def messages(rows: Reading, *, path: str, images: str) -> Sequence[Item]:
    """Read conversations in the schema of `transformers`: lines of ``{messages: [{role, content}], images: [...]}``.

    The content is a text, with ``<image>`` where an image is inserted, or a list of parts ``{type: text, text}`` and
    ``{type: image}``; an image part names its file (``image`` or ``path``), or is the next of ``images``. OpenAI's
    ``{type: image_url, image_url: {url}}`` names a file or is a data URL.

    Args:
        rows: the reading.
        path: the file: lines, or one list.
        images: the folder of the image files.

    Raises:
        MLLMError: as `llava`.
    """

    def item_of(row: Any, number: int) -> Item:
        remaining = iter(_listed_images(row, images))
        turns, sources = [], list[ImageSource]()
        for entry in row["messages"]:
            turns.append((_role(entry["role"]), _content(entry["content"], images, remaining, sources)))
        return _marked(identifier(row.get("id", number)), turns, [*sources, *remaining])

    return rows.items(records_of(Path(path)), item_of, _MESSAGES, finish=_unmarked)


def _content(content: Any, folder: str, remaining: Iterator[ImageSource], sources: list[ImageSource]) -> str:
    """Return a message's text with a mark for each image, and append its images to ``sources``."""
    if not isinstance(content, list):
        text = _text(content)
        sources += itertools.islice(remaining, text.count(MARK))
        return text
    text = ""
    for part in content:
        if part["type"] == "text":
            text += _without_mark(_text(part["text"]))
            continue
        text += MARK
        sources += [_image(part, folder)] if _named(part) is not None else itertools.islice(remaining, 1)
    return text


def _without_mark(text: str) -> str:
    if MARK in text:
        raise MLLMError(f"a part of type text has the mark {MARK}; expected a part of type image there. Correct it.")
    return text


def _named(part: Any) -> Any:
    """Return what names the image of a part: a file, a data URL, or None for the next of the listed images."""
    if part["type"] not in ("image", "image_url"):
        raise MLLMError(f"a part has the type {part['type']!r}; expected text, image or image_url. Remove the row.")
    if part["type"] == "image_url":
        return part["image_url"]["url"] if isinstance(part["image_url"], dict) else part["image_url"]
    return part.get("image") or part.get("path") or part.get("url")


def _image(part: Any, folder: str) -> ImageSource:
    name = _named(part)
    if not (isinstance(name, str) and name.startswith("data:")):
        return file_of(inside(folder, name))
    head, _, body = name.partition(",")
    try:
        return ImageBytes(base64.b64decode(body, validate=True), f"the data URL {head[:40]}")
    except binascii.Error as error:
        raise MLLMError(f"the data URL {head[:40]!r} is not base64: {error}. Correct it.") from None


def _role(name: Any) -> str:
    """Return the role of a speaker, whose name may be in capitals."""
    if isinstance(name, str) and name in _SPEAKERS:
        return _SPEAKERS[name]
    speaker = text_in(name, "speaker").lower()
    if speaker not in _SPEAKERS:
        raise MLLMError(f"no role is called {speaker!r}. {near(speaker, _SPEAKERS)} Remove the turn, or the row.")
    return _SPEAKERS[speaker]


def _text(value: Any) -> str:
    return text_in(value, "text of a turn")


def _listed_images(row: Any, folder: str) -> list[ImageSource]:
    """Return the images or videos that a row lists under one of the keys for them."""
    given = [key for key in _KEYS if key in row and not absent(row[key])]
    if len(given) > 1:
        raise MLLMError(f"it has both {given[0]!r} and {given[1]!r}. Keep one of them.")
    return [file_of(inside(folder, name)) for key in given for name in listed(row[key])]


def _check_marks(turns: Sequence[Turn], images: Sequence[ImageSource]) -> None:
    """Check that there is a mark per image or none, and that the assistant says something."""
    marks = "\0".join([text for _, text in turns]).count(MARK)
    if marks not in (0, len(images)):
        raise MLLMError(
            f"{marks} marks {MARK} for {len(images)} images; expected one per image, or none. Correct them."
        )
    if not any(role == "assistant" and text.replace(MARK, "").strip() for role, text in turns):
        raise MLLMError("no turn of the assistant has text; expected at least one to train on. Remove it.")


def _marked(name: str, turns: Sequence[Turn], images: Sequence[ImageSource]) -> Item:
    """Return a conversation that was checked, with marks in its texts."""
    _check_marks(turns, images)
    if not any(role == "user" for role, _ in turns):
        raise MLLMError("there is no turn of the user; expected a question before an answer. Remove it.")
    return Item(name, tuple(images), (), messages=tuple([{"role": role, "content": text} for role, text in turns]))


def _unmarked(item: Item) -> Item:
    """Return a conversation with its images in the place of the marks, or before its first question without marks."""
    if not item.messages:  # a caption
        return item
    remaining = iter(item.images)
    converted = [message(turn["role"], list(_parts(turn["content"], remaining))) for turn in item.messages]
    first = next(turn for turn in converted if turn["role"] == "user")
    first["content"] = [*({"type": "image", "image": image} for image in remaining), *first["content"]]
    return replace(item, messages=tuple(converted))


def _parts(text: str, images: Iterator[ImageSource]) -> Iterator[dict[str, Any]]:
    """Yield the parts of a text: its text between the marks, and the next image at each mark.

    Line breaks next to a mark are left out: LLaVA's format has one between an image and a question.
    """
    for number, segment in enumerate(text.strip().split(MARK)):
        if number:
            yield {"type": "image", "image": next(images)}
        if segment.strip():
            yield text_part(segment.strip("\r\n"))
