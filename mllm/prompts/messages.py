"""Turn a conversation into an interleaved prompt, to be answered or to be learned."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, Protocol

from mllm.config.parts import PromptSpec
from mllm.errors import MLLMError
from mllm.media.images import open_image, source_of
from mllm.prompts.pieces import Control, Piece, Target, answer_text, arrange

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
        prompt: the recipe's prompt format, or ``chat: own`` for the language model's chat template.
        lm: the language model; only its template is used.
        learn: the assistant's turns are targets, and what follows the last of them is left out.
    """
    pieces = (_templated if prompt.chat == "own" else _plain)(messages, prompt, lm, learn)
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

    Raises:
        MLLMError: a message of another form.
    """
    return [_checked(message) for message in messages]


def parts_of(message: dict[str, Any]) -> tuple[str, list[Any]]:
    """Return a message's text, and its images."""
    texts = [part["text"] for part in message["content"] if part["type"] == "text"]
    return " ".join(texts).strip(), [part["image"] for part in message["content"] if part["type"] == "image"]


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
        return text_part(part["text"])
    if kind == "image" and "image" in part:
        return {"type": "image", "image": source_of(part["image"])}
    if kind == "image_url" and isinstance(part.get("image_url"), dict):
        url = str(part["image_url"].get("url"))
        if not url.startswith("data:"):
            raise MLLMError(f"image_url is {url[:60]!r}; only data URLs are read, nothing is downloaded.")
        return {"type": "image", "image": source_of(open_image(url))}
    raise MLLMError(f"A part of a message is a text, an image or an image_url; got {str(part)[:80]!r}.")


def _plain(messages: Sequence[dict[str, Any]], prompt: PromptSpec, lm: Any, learn: bool) -> list[Piece]:
    """Format every turn with the recipe's prompt format."""
    pieces: list[Piece] = []
    for message in messages:
        text, images = parts_of(message)
        if message["role"] == "assistant":
            pieces += [Target(answer_text(text)), "\n"] if learn else [f"{answer_text(text)}\n"]
        elif message["role"] == "system":
            pieces.append(f"{text}\n")
        else:
            words = prompt.question.format(question=text) if text else prompt.caption
            pieces += arrange(prompt.template, images, words) if images else [words]
    return pieces


def _templated(messages: Sequence[dict[str, Any]], prompt: PromptSpec, lm: Any, learn: bool) -> list[Piece]:
    """Format the conversation with the language model's chat template.

    The template is filled with random markers, which are then replaced by texts and images: control tokens are
    recognised only in the template's text.
    """
    if lm.tokenizer.chat_template is None:
        raise MLLMError("This language model has no chat template: set prompt.chat=plain.")
    nonce = secrets.token_hex(8)
    contents: list[Piece] = []

    def marked(message: dict[str, Any]) -> dict[str, str]:
        start, is_target = len(contents), learn and message["role"] == "assistant"
        for part in message["content"]:
            piece = part["text"] if part["type"] == "text" else part["image"]
            contents.append(Target(piece) if is_target and part["type"] == "text" else piece)
        return {
            "role": message["role"],
            "content": "".join(f"{nonce}:{number};" for number in range(start, len(contents))),
        }

    text = lm.tokenizer.apply_chat_template(
        [marked(message) for message in messages], tokenize=False, add_generation_prompt=not learn
    )
    first, *rest = text.split(f"{nonce}:")
    pieces: list[Piece] = [Control(first)]
    for part in rest:
        number, _, control = part.partition(";")
        pieces += [contents[int(number)], Control(control)]
    return pieces
