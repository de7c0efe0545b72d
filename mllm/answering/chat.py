"""A conversation about pictures: several turns, several pictures in any of them.

Notable: what a person writes is tokenised as plain text, so it cannot smuggle in a control token or a picture; only
the words of the template may hold control tokens. Key-value states of earlier turns are kept: a turn costs its own
length, and its tokens are those of the whole conversation computed at once.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TextIteratorStreamer

from mllm.answering.decode import decodings
from mllm.answering.generate import generate
from mllm.errors import MLLMError
from mllm.media.images import ImageFile, source_of
from mllm.outputs import Output
from mllm.prompts.batch import Encoded, collate
from mllm.prompts.messages import checked_messages, message, text_part, turns
from mllm.prompts.pieces import images_of
from mllm.system import write


class Chat:
    """A conversation with a model.

    Args:
        model: the assembly.
        system: what the model is told before the first turn.
        messages: an earlier conversation, in transformers' or OpenAI's schema.

    Attributes:
        messages: the conversation, in transformers' schema; pictures are `ImageSource`.

    Raises:
        MLLMError: messages of another form, or a recipe that asks for a chat template where the model has none.
    """

    def __init__(self, model: Any, system: str | None = None, messages: Sequence[dict[str, Any]] = ()) -> None:
        self._model = model
        if model.spec.prompt.chat == "own" and model.lm.tokenizer.chat_template is None:
            raise MLLMError("This language model has no chat template of its own: set prompt.chat=plain.")
        self._start = [message("system", [text_part(system)])] if system else []
        self.messages = [*self._start, *checked_messages(messages)]
        self._cache: Any = None  # key-value states
        self._mask: list[int] = []  # of every state, whether it still counts
        self._seen: list[int | str] = []  # what the states that count stand for: ids, and pictures by their content

    def send(self, text: str, images: Sequence[Any] = (), **decoding: Any) -> str:
        """Say something, with pictures, and return the answer.

        Raises:
            MLLMError: nothing is said, a picture cannot be read, or the conversation outgrows the context; the
                conversation is then as it was.
        """
        return "".join(self._turn(text, images, decoding, _at_once))

    def stream(self, text: str, images: Sequence[Any] = (), **decoding: Any) -> Iterator[str]:
        """Say something, and yield the answer as it is written; the turn counts once all of it was taken."""
        return self._turn(text, images, decoding, _streamed)

    def _turn(
        self, text: str, images: Sequence[Any], decoding: dict[str, Any], writer: Any, answer_by: Any = None
    ) -> Iterator[str]:
        if not text.strip() and not images:
            raise MLLMError("Nothing was said: give a text, a picture, or both.")
        sources = [source_of(image) for image in images]
        for source in sources:
            source.open()
        turn = message("user", [*({"type": "image", "image": source} for source in sources), text_part(text)])
        messages = [*self.messages, turn]
        answer = ""
        for new in (answer_by or self._answer)(messages, decoding, writer):
            new = new if answer else new.lstrip()
            answer += new
            if new:
                yield new
        self.messages = [*messages, message("assistant", [text_part(answer.strip())])]

    def show(self, text: str, images: Sequence[Any] = (), **options: Any) -> Output:
        """Say something, and return the answer with its images; the conversation keeps the answer's words.

        Args:
            text: what is said.
            images: pictures said with it.
            options: what `mllm.model.Assembly.generate` takes: ``index``, ``images``, ``eager``, decoding.

        Raises:
            MLLMError: as `send`, or an index of another model.
        """
        found: list[Output] = []

        def answered(messages: Sequence[dict[str, Any]], decoding: dict[str, Any], _: Any) -> Iterator[str]:
            show = {name: decoding.pop(name) for name in ("index", "images", "eager") if name in decoding}
            found.extend(generate(self._model, [turns(self._model, messages)], decoding, **show))
            yield str(found[0])

        "".join(self._turn(text, images, options, None, answered))
        return found[0]

    def reset(self) -> None:
        """Forget all but what the model was told at the start."""
        self.messages = list(self._start)
        self._forget()

    def drop(self, turns: int = 1) -> None:
        """Forget the oldest turns, each a question and its answer."""
        first = len(self._start)
        self.messages = [*self._start, *self.messages[first + 2 * turns :]]

    def save(self, path: str | Path) -> Path:
        """Write the conversation as JSON: pictures by path where they are files, else as data URLs."""
        messages = [{**m, "content": [_saved(part) for part in m["content"]]} for m in self.messages]
        write(Path(path), lambda file: file.write_text(json.dumps(messages, indent=2, ensure_ascii=False) + "\n"))
        return Path(path)

    def _answer(self, messages: Sequence[dict[str, Any]], decoding: dict[str, Any], writer: Any) -> Iterator[str]:
        model = self._model
        pieces = turns(model, messages)
        try:
            encoded = model.encode(pieces)
        except MLLMError as error:
            raise MLLMError(f"{error} Drop the oldest turns (chat.drop(2)), or start anew (chat.reset()).") from None
        known = self._agree(encoded, images_of(pieces))
        if self._cache is None or any(encoded.visual[known:]):  # pictures come in as embeddings, not as ids
            self._read(encoded, images_of(pieces))
            known = len(self._seen)
        length = len(self._mask) + len(encoded.ids) - known
        length += int({**model.spec.decoding, **decoding}.get("max_new_tokens") or 0)
        if 0 in self._mask and model.lm.beyond(length):  # a window would count what is masked
            self._forget()
            self._read(encoded, images_of(pieces))
            known = len(self._seen)
        rest = encoded.ids[known:]
        mask = torch.tensor([self._mask + [1] * len(rest)], device=model.device)
        ids = torch.tensor([[model.lm.pad] * len(self._mask) + rest], device=model.device)
        cache = model.lm.fork(self._cache)
        answer = yield from writer(model, ids, mask, cache, decodings(model, [pieces], decoding))
        self._keep(cache, [*rest, *answer])

    def _agree(self, encoded: Encoded, images: Sequence[Any]) -> int:
        """Mask what the states hold and the conversation no longer says; return how much of it they hold."""
        said = _said(encoded, images)
        same = next((i for i, (a, b) in enumerate(zip(self._seen, said, strict=False)) if a != b), len(self._seen))
        same = min(same, len(said) - 1)  # one token is needed to start from
        if same < len(self._seen) / 2:  # a turn was dropped, or a template words earlier turns anew
            self._forget()
            return 0
        visible = [place for place, shown in enumerate(self._mask) if shown]
        for place in visible[same:]:
            self._mask[place] = 0
        self._seen = self._seen[:same]
        return same

    @torch.no_grad()
    def _read(self, encoded: Encoded, images: Sequence[Any]) -> None:
        """Bring the key-value states up to all of the conversation but its last token."""
        model, known, end = self._model, len(self._seen), len(encoded.ids) - 1
        part = Encoded(encoded.ids[known:end], encoded.visual[known:end], encoded.labels[known:end])
        before = sum(encoded.visual[:known]) // model.tokens_per_image
        new = images[before:]
        batch = collate([part], model.lm.pad).to(model.device)
        embeds = model.embed(model.connector(model.features(new)) if new else None, batch)
        if self._cache is None:
            self._cache, _ = model.lm.prefill(embeds, batch.mask)
        else:
            mask = torch.tensor([self._mask + [1] * (end - known)], device=model.device)
            model.lm.logits(embeds, mask, keep=torch.tensor([0], device=model.device), cache=self._cache)
        self._mask += [1] * (end - known)
        self._seen = _said(encoded, images)[:end]

    def _keep(self, cache: Any, ids: list[int]) -> None:
        """Keep the states that answering left: of what was read, and of the answer but for its last token."""
        new = self._model.lm.length(cache) - len(self._mask)
        self._cache, self._mask, self._seen = cache, self._mask + [1] * new, [*self._seen, *ids[:new]]

    def _forget(self) -> None:
        self._cache, self._mask, self._seen = None, [], []


def _said(encoded: Encoded, images: Sequence[Any]) -> list[int | str]:
    """Return a prompt's ids, and its pictures' hashes in the places of visual tokens."""
    count = sum(encoded.visual) // max(len(images), 1)
    keys = iter([key for image in images for key in [source_of(image).key()] * count])
    return [next(keys) if visual else token for token, visual in zip(encoded.ids, encoded.visual, strict=True)]


def _at_once(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, cache: Any, settings: Sequence[dict[str, Any]]
) -> Generator[str, None, list[int]]:
    """Yield an answer's text whole; return its ids. Without a second thread, which would cost time."""
    (answer,) = model.lm.generate(mask, settings, cache=cache, input_ids=ids)
    yield model.lm.decode(answer)
    return list(answer)


def _streamed(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, cache: Any, settings: Sequence[dict[str, Any]]
) -> Generator[str, None, list[int]]:
    """Yield an answer's text as it is written; return its ids."""
    streamer = TextIteratorStreamer(model.lm.tokenizer, skip_prompt=True, skip_special_tokens=True)
    found: list[Any] = []

    def work() -> None:
        try:
            found.extend(model.lm.generate(mask, settings, cache=cache, streamer=streamer, input_ids=ids))
        except Exception as error:  # it is raised where the answer is read
            found.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if isinstance(found[0], Exception):
        raise found[0]
    return list(found[0])


def _saved(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return part
    source = part["image"]
    if isinstance(source, ImageFile):
        return {"type": "image", "image": str(source.path.resolve())}
    buffer = io.BytesIO()
    source.open().save(buffer, "PNG")
    return {"type": "image", "image": f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"}
