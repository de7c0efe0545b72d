"""Readers of conversations to learn from: LLaVA's JSON, and messages in transformers' schema."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from mllm.data.files import form, inside, json_lines, json_of, present
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.media.images import ImageFile, ImageSource
from mllm.prompts.messages import checked_messages, message, text_part

MARK = "<image>"
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def llava(*, path: str, images: str, task: Literal["conversations", "captions"] = "conversations") -> list[Item]:
    """Read LLaVA's JSON: ``[{id, image, conversations: [{from: human | gpt, value}]}]``; one item a conversation.

    ``image`` is a file, a list of files, or absent (text alone); each ``<image>`` is the next one's place. Without any,
    the images come first.

    Args:
        path: the file.
        images: the folder of the pictures.
        task: ``captions`` takes the first answer as the picture's caption and discards what is asked, as LLaVA's first
            stage does.

    Raises:
        MLLMError: the file is missing or of another form, a conversation's marks and images differ in number, it has no
            answer, or pictures are not there.
    """
    content = json_of(Path(path))
    items = []
    with form(path, "[{id, image, conversations: [{from: human or gpt, value}]}]"):
        for number, row in enumerate(content):
            said = [(_SPEAKERS[turn["from"]], str(turn["value"])) for turn in row["conversations"]]
            files = row.get("image") or []
            sources = [ImageFile(inside(images, name, path)) for name in ([files] if isinstance(files, str) else files)]
            where = f"{path}, conversation {row.get('id', number)!r}"
            item = _item(str(row.get("id", number)), said, sources, where)
            items.append(_caption(item, said, where) if task == "captions" else item)
    return present(items, path)


def _caption(item: Item, said: Sequence[tuple[str, str]], where: str) -> Item:
    if len(item.images) != 1:
        raise MLLMError(f"{where}: {len(item.images)} images; a caption needs one image.")
    return Item(item.id, item.images, (next(text for role, text in said if role == "assistant"),))


def messages(*, path: str, images: str) -> list[Item]:
    """Read conversations in transformers' schema: lines of ``{messages: [{role, content}], images: [...]}``.

    A content is a text, where ``<image>`` marks a place, or a list of parts ``{type: text, text}`` and
    ``{type: image}``; an image part names its file (``image`` or ``path``), or stands for the next of ``images``.

    Args:
        path: the file.
        images: the folder of the pictures.

    Raises:
        MLLMError: as `llava`.
    """
    items = []
    with form(path, "lines of {messages: [{role, content}], images: [...]}"):
        for number, row in enumerate(json_lines(Path(path)), start=1):
            listed = iter([ImageFile(inside(images, name, path)) for name in row.get("images") or []])
            said, sources = [], list[ImageSource]()
            for turn in row["messages"]:
                text, content = "", turn["content"]
                for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                    named = part.get("image") or part.get("path")
                    text += part["text"] if part["type"] == "text" else MARK
                    wanted = text.count(MARK) if isinstance(content, str) else int(part["type"] == "image")
                    if named:
                        sources.append(ImageFile(inside(images, named, path)))
                    else:
                        sources += itertools.islice(listed, wanted)
                said.append((_SPEAKERS[turn["role"]], text))
            items.append(_item(str(row.get("id", number)), said, [*sources, *listed], f"{path}, line {number}"))
    return present(items, path)


def _item(name: str, said: Sequence[tuple[str, str]], images: Sequence[ImageSource], where: str) -> Item:
    """Return a conversation, its marks replaced by its images."""
    marks = sum(text.count(MARK) for _, text in said)
    if marks not in (0, len(images)):
        raise MLLMError(f"{where}: {marks} marks {MARK} for {len(images)} images; expected one for each, or none.")
    if not any(role == "assistant" and text.strip() for role, text in said):
        raise MLLMError(f"{where}: nothing is answered, so there is nothing to learn.")
    rest = iter(images)
    turns = [message(role, list(_parts(text, rest))) for role, text in said]
    first = next(turn for turn in turns if turn["role"] == "user")
    first["content"] = [*({"type": "image", "image": image} for image in rest), *first["content"]]
    return Item(name, tuple(images), (), messages=tuple(checked_messages(turns)))


def _parts(text: str, images: Iterator[ImageSource]) -> Iterator[dict[str, Any]]:
    """Yield a text's parts: words, and at each mark the next image."""
    first, *others = text.split(MARK)
    if first.strip():
        yield text_part(first.strip())
    for words in others:
        yield {"type": "image", "image": next(images)}
        if words.strip():
            yield text_part(words.strip())
