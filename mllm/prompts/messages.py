"""Turn a conversation into an interleaved prompt, to be answered or to be learned."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

from mllm.config.prompt import PromptSpec
from mllm.errors import MLLMError
from mllm.media.data_urls import from_data_url, is_data_url
from mllm.media.images import open_image, source_of
from mllm.media.videos import MAX_BYTES, VideoBytes, video_source_of
from mllm.prompts.chat_template import templated, uses_template
from mllm.prompts.formatting import preamble
from mllm.prompts.pieces import Given, Piece, Target, arrange, is_image, joined
from mllm.system import checked_text

ROLES = ("system", "user", "assistant")


class ChatModel(Protocol):
    """A model with a prompt format and a language model."""

    spec: Any  # an `mllm.config.parts.AssemblySpec`
    lm: Any


def turns(model: ChatModel, messages: Sequence[dict[str, Any]]) -> list[Piece]:
    """Return a conversation as an interleaved prompt that ends where the answer starts."""
    return rendered(messages, model.spec.prompt, model.lm)


def rendered(messages: Sequence[dict[str, Any]], prompt: PromptSpec, lm: Any, *, learn: bool = False) -> list[Piece]:
    """Return a conversation as an interleaved prompt.

    Args:
        messages: checked ones (`checked_messages`).
        prompt: the recipe's prompt format, which says whether the language model's chat template is used.
        lm: the language model; only its template and tokenizer are used.
        learn: the assistant's turns are targets, and what follows the last of them is left out.

    Raises:
        MLLMError: the chat template refuses the conversation, or leaves a turn out.
    """
    if learn:
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
        messages = messages[: last + 1]
    begins = bool(messages) and messages[0]["role"] == "system"
    if uses_template(prompt, lm):
        own = [] if begins or not prompt.system else [message("system", [text_part(prompt.system.strip())])]
        return templated([*own, *messages], prompt, lm, learn=learn)
    pieces = _plain(messages, prompt.model_copy(update={"system": ""}) if begins else prompt, learn)
    while learn and pieces and not isinstance(pieces[-1], Target):
        pieces.pop()
    return pieces


def message(role: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a message."""
    return {"role": role, "content": content}


def text_part(text: str) -> dict[str, Any]:
    """Return a text as a part of a message."""
    return {"type": "text", "text": text}


def checked_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Return messages of transformers' or OpenAI's schema in transformers' schema, images as `ImageSource`.

    A video is a part like an image, of type ``image``: templates and models read it where they read an image.

    Raises:
        MLLMError: a message of another form.
    """
    return [_checked(message) for message in messages]


def _checked(original: Any) -> dict[str, Any]:
    """Return one message in transformers' schema."""
    if not isinstance(original, dict) or original.get("role") not in ROLES:
        raise MLLMError(f"A message needs a role ({', '.join(ROLES)}) and a content; got {str(original)[:80]!r}.")
    content = original.get("content")
    parts = [text_part(content)] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise MLLMError(f"A message's content is a text or a list of parts; got {type(content).__name__}.")
    return message(original["role"], [_part(part) for part in parts])


def _part(part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return text_part(checked_text(part["text"]))
    if kind == "image" and "image" in part:
        return {"type": "image", "image": source_of(part["image"])}
    if kind == "image_url" and isinstance(part.get("image_url"), dict):
        return {"type": "image", "image": source_of(open_image(_data_url(part, kind)))}
    if kind == "video" and "video" in part:
        return {"type": "image", "image": video_source_of(part["video"])}
    if kind == "video_url" and isinstance(part.get("video_url"), dict):
        data = from_data_url(_data_url(part, kind), MAX_BYTES)
        return {"type": "image", "image": VideoBytes(data, f"the video of {len(data)} bytes")}
    raise MLLMError(
        f"A part of a message is a text, an image or an image_url, a video or a video_url; got {str(part)[:80]!r}."
    )


def _data_url(part: dict[str, Any], kind: str) -> str:
    """Return the data URL of a part of a message."""
    url = str(part[kind].get("url"))
    if not is_data_url(url):
        raise MLLMError(f"{kind} is {url[:60]!r}; only data URLs are read, nothing is downloaded.")
    return url


def _plain(messages: Sequence[dict[str, Any]], prompt: PromptSpec, learn: bool) -> list[Piece]:
    """Format every turn with the recipe's prompt format, after its preamble; images stay among the words."""
    pieces = preamble(prompt)
    for message in messages:
        parts = _words(message)
        if message["role"] == "assistant":
            pieces += [*_answer(parts, learn), Given("\n")]
        elif message["role"] == "system":
            pieces += [*parts, Given("\n")]
        else:
            leading = list(itertools.takewhile(is_image, parts))
            words = _question(parts[len(leading) :], prompt)
            pieces += arrange(prompt.template, leading, words.pop(0)) if leading else [prompt.opening]
            pieces += words
    return pieces


def _words(message: dict[str, Any]) -> list[Piece]:
    """Return a message's texts and images in order: neighbouring texts with a space between them, none at the ends."""
    parts: list[Piece] = []
    for part in message["content"]:
        if part["type"] == "image":
            parts.append(part["image"])
        elif parts and isinstance(parts[-1], str):
            parts[-1] = f"{parts[-1]} {part['text']}"
        else:
            parts.append(part["text"])
    if parts and isinstance(parts[0], str):
        parts[0] = parts[0].lstrip()
    if parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
    return [part for part in parts if part != ""]


def _question(parts: list[Piece], prompt: PromptSpec) -> list[Piece]:
    """Return a question in the recipe's words, a text first; without a text it is the caption prompt."""
    texts = [part for part in parts if isinstance(part, str)]
    if not texts:
        return [prompt.caption, *parts]
    before, _, after = prompt.question.partition("{question}")
    first, *rest = joined([before, *(part.strip() if len(parts) == 1 else part for part in parts), after])
    return [first, *rest] if isinstance(first, str) else ["", first, *rest]


def _answer(parts: list[Piece], learn: bool) -> list[Piece]:
    """Return an assistant's turn after a space; its texts are targets, and the last of them ends."""
    if parts and isinstance(parts[0], str):
        parts = [f" {parts[0]}", *parts[1:]]
    last = max((index for index, part in enumerate(parts) if isinstance(part, str)), default=-1)
    return [
        part if is_image(part) else Target(part, ends=index == last) if learn else Given(part)
        for index, part in enumerate(parts)
    ]
