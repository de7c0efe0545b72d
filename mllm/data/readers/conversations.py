"""Read conversations to train on: LLaVA's JSON, and messages in the schema of `transformers`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from mllm.data.files import check_present, expect_form, inside, json_lines, json_of
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.media.images import ImageFile, ImageSource
from mllm.prompts.messages import checked_messages, message, text_part

MARK = "<image>"
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def llava(*, path: str, images: str, task: Literal["conversations", "captions"] = "conversations") -> list[Item]:
    """Read LLaVA's JSON: ``[{id, image, conversations: [{from: human | gpt, value}]}]``; an item per conversation.

    ``image`` is a file, a list of files, or absent (text only). Each ``<image>`` marks where the next image goes;
    without marks, the images come first.

    Args:
        path: the file.
        images: the folder of the image files.
        task: ``captions`` uses the first answer as the image's caption and discards the question, as in LLaVA's first
            stage.

    Raises:
        MLLMError: the file is missing or has an unexpected form, the numbers of marks and images differ, a conversation
            has no answer, or image files are missing.
    """
    content = json_of(Path(path))
    items = []
    with expect_form(path, "[{id, image, conversations: [{from: human or gpt, value}]}]"):
        for number, row in enumerate(content):
            turns = [(_SPEAKERS[turn["from"]], str(turn["value"])) for turn in row["conversations"]]
            files = row.get("image") or []
            sources = [ImageFile(inside(images, name, path)) for name in ([files] if isinstance(files, str) else files)]
            label = f"{path}, conversation {row.get('id', number)!r}"
            item = _item(str(row.get("id", number)), turns, sources, label)
            items.append(_caption(item, turns, label) if task == "captions" else item)
    return check_present(items, path)


def _caption(item: Item, turns: Sequence[tuple[str, str]], label: str) -> Item:
    if len(item.images) != 1:
        raise MLLMError(f"{label}: {len(item.images)} images; a caption needs one image. Remove the conversation.")
    return Item(item.id, item.images, (next(text for role, text in turns if role == "assistant"),))


def messages(*, path: str, images: str) -> list[Item]:
    """Read conversations in the schema of `transformers`: lines of ``{messages: [{role, content}], images: [...]}``.

    The content is a text, with ``<image>`` where an image is inserted, or a list of parts ``{type: text, text}`` and
    ``{type: image}``; an image part names its file (``image`` or ``path``), or is the next of ``images``.

    Args:
        path: the file.
        images: the folder of the image files.

    Raises:
        MLLMError: as `llava`.
    """
    items = []
    with expect_form(path, "lines of {messages: [{role, content}], images: [...]}"):
        for number, row in enumerate(json_lines(Path(path)), start=1):
            listed = iter([ImageFile(inside(images, name, path)) for name in row.get("images") or []])
            turns, sources = [], list[ImageSource]()
            for entry in row["messages"]:
                text, content = "", entry["content"]
                for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                    file = part.get("image") or part.get("path")
                    text += part["text"] if part["type"] == "text" else MARK
                    count = text.count(MARK) if isinstance(content, str) else int(part["type"] == "image")
                    if file:
                        sources.append(ImageFile(inside(images, file, path)))
                    else:
                        sources += itertools.islice(listed, count)
                turns.append((_SPEAKERS[entry["role"]], text))
            items.append(_item(str(row.get("id", number)), turns, [*sources, *listed], f"{path}, line {number}"))
    return check_present(items, path)


def _item(name: str, turns: Sequence[tuple[str, str]], images: Sequence[ImageSource], label: str) -> Item:
    """Return a conversation with its marks replaced by its images."""
    marks = sum(text.count(MARK) for _, text in turns)
    if marks not in (0, len(images)):
        raise MLLMError(
            f"{label}: {marks} marks {MARK} for {len(images)} images; expected one per image, or none. Correct them."
        )
    if not any(role == "assistant" and text.strip() for role, text in turns):
        raise MLLMError(f"{label}: no turn of the assistant has text; expected at least one to train on. Remove it.")
    remaining = iter(images)
    converted = [message(role, list(_parts(text, remaining))) for role, text in turns]
    first = next(turn for turn in converted if turn["role"] == "user")
    first["content"] = [*({"type": "image", "image": image} for image in remaining), *first["content"]]
    return Item(name, tuple(images), (), messages=tuple(checked_messages(converted)))


def _parts(text: str, images: Iterator[ImageSource]) -> Iterator[dict[str, Any]]:
    """Yield the parts of a text: its text between the marks, and the next image at each mark.

    Line breaks next to a mark are left out: LLaVA's format has one between an image and a question.
    """
    for number, segment in enumerate(text.strip().split(MARK)):
        if number:
            yield {"type": "image", "image": next(images)}
        if segment.strip():
            yield text_part(segment.strip("\r\n"))
