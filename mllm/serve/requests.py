"""Turn the messages of a request into a prompt: read their images, check their length, and open the images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jinja2 import TemplateError

from mllm.errors import MLLMError
from mllm.media.data_urls import from_data_url, is_data_url
from mllm.media.images import ImageBytes, open_image, source_of
from mllm.media.videos import VideoBytes
from mllm.model import Model
from mllm.prompts.messages import checked_messages, turns
from mllm.prompts.pieces import images_of
from mllm.serve.remote import Remote
from mllm.serve.schema import Limits

MAX_PARTS = 4096  # messages and their parts
TEXT_PER_TOKEN = 64  # characters; a text with more of them per token of the context is not tokenized
SLICE = 2**15  # characters of a long text that are tokenized at a time
SPARE = 64  # tokens by which a slice's number may differ from its number in the whole text


def needs_remote(messages: list[dict[str, Any]]) -> bool:
    """Whether an image or a video is in a file or on a host."""
    return any(not is_data_url(url) for url in map(_url, _parts(messages)) if url is not None)


def with_images(model: Model, messages: list[dict[str, Any]], remote: Remote, limits: Limits) -> list[dict[str, Any]]:
    """Return checked messages with the bytes of their images and videos; local paths in them are never opened.

    Raises:
        MLLMError: the messages are not in OpenAI's schema, have too many images, or one that cannot be read.
    """
    parts = list(_parts(messages))
    if len(messages) + len(parts) > MAX_PARTS:
        raise MLLMError(f"The request has {len(messages)} messages with {len(parts)} parts; at most {MAX_PARTS}.")
    kinds = [part.get("type") for part in parts if isinstance(part, dict)]
    count = kinds.count("image_url") + kinds.count("video_url")
    if count > limits.images:
        raise MLLMError(f"The request has {count} images; at most {limits.images} are allowed.")
    if count and (model.encoder is None or model.connector is None):
        raise MLLMError("This model has no encoder and connector, so it takes no images: send text alone.")
    if "video_url" in kinds and not model.encoder.reads_videos:
        raise MLLMError("This model takes no videos: its encoder reads images. Send an image_url.")
    reader = _Reader(remote, limits.body)
    checked = checked_messages([_message(message, reader) for message in messages])
    if checked[-1]["role"] != "user":
        raise MLLMError("The last message must be the user's, which is answered.")
    return checked


def prompt_of(model: Model, messages: list[dict[str, Any]], limits: Limits) -> list[Any]:
    """Return checked messages as a prompt whose length fits.

    Raises:
        MLLMError: the conversation is not one that this model can answer.
    """
    _check_texts(model.lm, [part["text"] for part in _parts(messages) if part["type"] == "text"], limits)
    pieces = _pieces(model, messages)
    model.encode(pieces)
    return pieces


def pixels_of(model: Model, prompt: list[Any]) -> int:
    """Return the number of pixels of a prompt's images and of its videos' frames, as their files declare it.

    Raises:
        MLLMError: one is not an image, or too large.
    """
    images = images_of(prompt)
    return sum(model.encoder.pixels(image) for image in images) if images else 0


def opened(model: Model, prompt: list[Any]) -> list[Any]:
    """Return a prompt with its images and videos opened."""
    if model.encoder is None:
        return prompt
    return [_opened(model.encoder, piece) if images_of([piece]) else piece for piece in prompt]


def _opened(encoder: Any, piece: Any) -> Any:
    return encoder.open(piece if isinstance(piece, VideoBytes) else source_of(open_image(piece)))


class _Reader:
    """Reads the images of one request.

    Args:
        remote: reads those that are not in the request.
        limit: of the bytes of those.
    """

    def __init__(self, remote: Remote, limit: int) -> None:
        self._remote, self._left, self._read = remote, limit, 0

    def read(self, url: str, kind: str) -> ImageBytes:
        """Return an image or a video, not decoded; ``kind``: ``image_url`` or ``video_url``.

        Messages name it by its number in the request.
        """
        self._read += 1
        form, name = VideoBytes if kind == "video_url" else ImageBytes, f"{kind.removesuffix('_url')} {self._read}"
        if is_data_url(url):
            return form(from_data_url(url, len(url)), f"{name}, a data URL")
        data = self._remote.read(url, self._left)
        self._left -= len(data)
        return form(data, f"{name}, of {len(data)} bytes")


def _parts(messages: list[dict[str, Any]]) -> Iterator[Any]:
    """Yield the parts of all messages."""
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            yield from content


def _url(part: Any) -> str | None:
    """Return the URL of a part that is an image or a video."""
    kind = part.get("type") if isinstance(part, dict) else None
    image = part.get(kind) if kind in ("image_url", "video_url") else None
    url = image.get("url") if isinstance(image, dict) else image
    return url if isinstance(url, str) else None


def _check_texts(lm: Any, texts: list[str], limits: Limits) -> None:
    """Refuse texts that are far too long without tokenizing all of them.

    Raises:
        MLLMError: they have too many characters, or their start has too many tokens already.
    """
    length, context = sum(map(len, texts)), lm.context
    most = limits.characters if context is None else min(limits.characters, TEXT_PER_TOKEN * context)
    if length > most:
        raise MLLMError(
            f"The messages have {length} characters; at most {most} are read"
            f"{'' if context is None else f': the context is {context} tokens'}. Shorten them."
        )
    if context is None or length <= SLICE:
        return
    left = context
    for text in texts:
        for start in range(0, len(text), SLICE):
            left -= max(0, len(lm.tokenize(text[start : start + SLICE])) - SPARE)
            if left < 0:
                raise MLLMError(
                    f"The messages have {length} characters, which are more tokens than the language model's context "
                    f"is long: the context is {context} tokens. Shorten them."
                )


def _pieces(model: Model, messages: list[dict[str, Any]]) -> list[Any]:
    try:
        return turns(model, messages)
    except MLLMError:
        raise
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:  # raised by the template
        reason = str(error).strip().rstrip(".") or type(error).__name__
        raise MLLMError(f"The model's chat template refuses the conversation: {reason}. Change its messages.") from None


def _message(message: dict[str, Any], reader: _Reader) -> dict[str, Any]:
    """Return a message of OpenAI's schema with its images read."""
    role = "system" if message.get("role") == "developer" else message.get("role")
    for name in ("tool_calls", "function_call", "audio"):
        if message.get(name):
            raise MLLMError(f"A message has {name}, which is not supported. Send its text as 'content'.")
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, list):
        content = [_part(part, reader) for part in content]
    return {"role": role, "content": content}


def _part(part: Any, reader: _Reader) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "refusal") and isinstance(part.get(kind), str):
        return {"type": "text", "text": part[kind]}
    if (url := _url(part)) is not None:
        return {"type": "image", "image": reader.read(url, str(kind))}
    raise MLLMError(
        "A part of a message is a text or an image_url, or a video_url where the model reads videos; got "
        f"{str(part)[:80]!r}. Expected "
        "{'type': 'text', 'text': ...} or {'type': 'image_url', 'image_url': {'url': ...}}."
    )
