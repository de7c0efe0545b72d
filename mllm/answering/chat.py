"""Hold a conversation about images: several turns, several images in any of them.

Notable: what a user writes is tokenized as plain text, so it cannot smuggle in a control token or an image; only the
chat template may contain control tokens. The KV cache of earlier turns is kept: a turn costs its length only, and its
tokens are those of the whole conversation computed at once.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
from transformers import TextIteratorStreamer

from mllm.answering.decode import for_encoded, generate_ids, make_decoding
from mllm.answering.generate import answer_prompts, generate
from mllm.answering.saved_chat import saved_part
from mllm.answering.shared import prefilled
from mllm.errors import MLLMError
from mllm.lms.decoding import Decoding
from mllm.lms.generation import exceeds
from mllm.media.images import source_of
from mllm.media.videos import video_source_of
from mllm.model import Model
from mllm.outputs import Output
from mllm.prompts.batch import Encoded, collate
from mllm.prompts.chat_template import uses_template
from mllm.prompts.messages import checked_messages, message, text_part, turns
from mllm.prompts.pieces import Piece, counted, images_of
from mllm.system import checked_text, write

Messages = Sequence[dict[str, Any]]
Generation = Callable[..., list[list[int]]]  # generates the ids of one prompt; takes a streamer


class Chat:
    """A conversation with a model.

    Args:
        model: the model.
        system: the system message.
        messages: an earlier conversation, in transformers' or OpenAI's schema.

    Attributes:
        messages: the conversation, in transformers' schema; images are `ImageSource`.

    Raises:
        MLLMError: messages of another form, or a recipe that asks for a chat template where the model has none.
    """

    def __init__(self, model: Model, system: str | None = None, messages: Messages = ()) -> None:
        self._model = model
        uses_template(model.spec.prompt, model.lm)
        self._start = [message("system", [text_part(system)])] if system else []
        self.messages = [*self._start, *checked_messages(messages)]
        self._cache: Any = None  # the KV cache
        self._mask: list[int] = []  # of the cache, 0 where it holds something else than the conversation
        self._cached: list[int | str] = []  # its unmasked positions: ids, and images by their hash

    def send(self, text: str, images: Sequence[Any] = (), **decoding: Any) -> str:
        """Send a message, with images, and return the answer.

        Raises:
            MLLMError: the message is empty or no Unicode, an image cannot be read, or the conversation is too long; the
                conversation is then as it was.
        """
        decode = functools.partial(self._answer, self._decoding(text, decoding), _decode_at_once)
        return "".join(self._turn(text, images, decode)).rstrip()

    def stream(self, text: str, images: Sequence[Any] = (), **decoding: Any) -> Iterator[str]:
        """Send a message, and yield the answer as it is generated; the turn counts once all of it was read.

        With beams, ``candidates`` or ``nearest_words`` the answer comes in one piece.
        """
        decode = functools.partial(self._answer, self._decoding(text, decoding), _decode_streamed)
        return self._turn(text, images, decode)

    def show(self, text: str, images: Sequence[Any] = (), **options: Any) -> Output:
        """Send a message, and return the answer with its images; the conversation keeps the answer's text.

        Args:
            text: of the message.
            images: of the message.
            options: those of `mllm.assembly.Assembly.generate`: ``index``, ``images``, ``image_logit_bias``, decoding.

        Raises:
            MLLMError: as `send`, or an index of another model.
        """
        outputs: list[Output] = []
        shown = {name: options.pop(name) for name in ("index", "images", "image_logit_bias") if name in options}

        def answer(messages: Messages) -> Iterator[str]:
            outputs.extend(generate(self._model, [turns(self._model, messages)], _with_kind(text, options), **shown))
            yield str(outputs[0])

        "".join(self._turn(text, images, answer))
        return outputs[0]

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = list(self._start)
        self._forget()

    def drop(self, turns: int = 1) -> None:
        """Forget the oldest turns, each a question and its answer."""
        first = len(self._start)
        self.messages = [*self._start, *self.messages[first + 2 * turns :]]

    def save(self, path: str | Path) -> Path:
        """Write the conversation as JSON: images by path where they are files, else as data URLs.

        Raises:
            MLLMError: the file cannot be written; the conversation continues.
        """
        messages = [{**m, "content": [saved_part(part) for part in m["content"]]} for m in self.messages]
        text = json.dumps(messages, indent=2, ensure_ascii=False) + "\n"
        try:
            write(Path(path), lambda file: file.write_text(text, encoding="utf-8", errors="replace"))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise MLLMError(f"{str(path)[:200]} cannot be written: {reason}. Give another file.") from None
        return Path(path)

    def _decoding(self, text: str, options: Mapping[str, Any]) -> Decoding:
        """Return what the answer to a message is decoded with."""
        return make_decoding(self._model, _with_kind(text, options))

    def _turn(self, text: str, images: Sequence[Any], answer: Callable[[Messages], Iterator[str]]) -> Iterator[str]:
        """Yield the answer to a new message, then add both to the conversation."""
        if not checked_text(text).strip() and not images:
            raise MLLMError("The message is empty: give a text, an image, or both.")
        sources = [_source_of(self._model, image) for image in images]
        question = message("user", [*({"type": "image", "image": source} for source in sources), text_part(text)])
        messages = [*self.messages, question]
        whole = ""
        for new in answer(messages):
            new = new if whole else new.lstrip()
            whole += new
            if new:
                yield new
        self.messages = [*messages, message("assistant", [text_part(whole.strip())])]

    def _answer(self, decoding: Decoding, decode: Any, messages: Messages) -> Iterator[str]:
        """Yield the answer to a conversation; what the cache holds of it is not encoded again."""
        model = self._model
        pieces = turns(model, messages)
        images = images_of(pieces)
        if decoding.selects:
            yield str(answer_prompts(model, [pieces], decoding, images=0)[0])
            return
        counts = counted(images, model.counts)  # an image that cannot be counted is no matter of the length
        try:
            encoded = model.encode(pieces)
            decoding = for_encoded(model, encoded, decoding)
        except MLLMError as error:
            if all(message["role"] != "assistant" for message in messages):  # there are no earlier turns to drop
                raise
            raise MLLMError(f"{error} Drop the oldest turns (chat.drop(2)), or start over (chat.reset()).") from None
        content = _content(encoded, images, counts, model.questions([pieces]))
        known = self._mask_changes(content)
        if self._cache is None or any(encoded.visual[known:]):  # images come in as embeddings, not as ids
            self._prefill(encoded, content, pieces)
            known = len(self._cached)
        length = len(self._mask) + len(encoded.ids) - known + (decoding.max_new_tokens or 0)
        if 0 in self._mask and (model.lm.exceeds_window(length) or exceeds(model.lm, length)):  # masked ones count
            self._forget()
            self._prefill(encoded, content, pieces)
            known = len(self._cached)
        rest = encoded.ids[known:]
        mask = torch.tensor([self._mask + [1] * len(rest)], device=model.device)
        ids = torch.tensor([[model.lm.pad] * len(self._mask) + rest], device=model.device)
        cache = model.lm.fork(self._cache)
        run = functools.partial(generate_ids, model, [pieces], [decoding], mask, cache=cache, input_ids=ids)
        if decoding.num_beams > 1:  # the answer is known when it is complete, and the cache holds all beams
            yield from _decode_at_once(model, run)
            return
        answer = yield from decode(model, run)
        self._keep(cache, [*rest, *answer])

    def _mask_changes(self, wanted: list[int | str]) -> int:
        """Mask what the cache holds and the conversation no longer has; return how much of it the cache holds."""
        different = (i for i, (a, b) in enumerate(zip(self._cached, wanted, strict=False)) if a != b)
        same = next(different, len(self._cached))
        same = min(same, len(wanted) - 1)  # one token is needed to start from
        if same < len(self._cached) / 2:  # a turn was dropped, or a template formats earlier turns differently
            self._forget()
            return 0
        visible = [position for position, counts in enumerate(self._mask) if counts]
        for position in visible[same:]:
            self._mask[position] = 0
        self._cached = self._cached[:same]
        return same

    @torch.no_grad()
    def _prefill(self, encoded: Encoded, content: list[int | str], pieces: Sequence[Piece]) -> None:
        """Extend the cache to all of the conversation but its last token."""
        model, known, end = self._model, len(self._cached), len(encoded.ids) - 1
        part = Encoded(encoded.ids[known:end], encoded.visual[known:end], encoded.labels[known:end])
        images, questions = images_of(pieces), model.questions([pieces])
        before = sum(encoded.visual[:known])
        first = sum(end <= before for end in accumulate(counted(images, model.counts)))
        batch = collate([part], model.lm.pad).to(model.device)
        embeds = model.embed(model.see_images(images[first:], questions and questions[first:]), batch)
        if self._cache is None:
            self._cache, _ = prefilled(model, embeds, batch)
        else:
            mask = torch.tensor([self._mask + [1] * (end - known)], device=model.device)
            model.lm.logits(embeds, mask, keep=torch.tensor([0], device=model.device), cache=self._cache)
        self._mask += [1] * (end - known)
        self._cached = content[:end]

    def _keep(self, cache: Any, ids: list[int]) -> None:
        """Keep the cache that decoding leaves: of the conversation, and of the answer but for its last token."""
        new = self._model.lm.length(cache) - len(self._mask)
        self._cache, self._mask, self._cached = cache, self._mask + [1] * new, [*self._cached, *ids[:new]]

    def _forget(self) -> None:
        self._cache, self._mask, self._cached = None, [], []


def _with_kind(text: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message's decoding options: an image without a text is captioned."""
    return {"kind": "question" if text.strip() else "caption", **options}


def _content(
    encoded: Encoded, images: Sequence[Any], counts: Sequence[int], questions: Sequence[str] | None
) -> list[int | str]:
    """Return a prompt's ids, with its images' hashes in place of visual tokens, as many as each image takes.

    Where the connector reads an image's question, that is part of the hash.
    """
    texts = [""] * len(images) if questions is None else questions
    each = zip(images, texts, counts, strict=True)
    keys = iter([key for image, text, count in each for key in [f"{source_of(image).key()} {text}"] * count])
    return [next(keys) if visual else token for token, visual in zip(encoded.ids, encoded.visual, strict=True)]


def _decode_at_once(model: Model, run: Generation) -> Generator[str, None, list[int]]:
    """Yield an answer's whole text; return its ids. Without a second thread, which would cost time."""
    (answer,) = run()
    yield model.lm.decode(answer)
    return list(answer)


def _decode_streamed(model: Model, run: Generation) -> Generator[str, None, list[int]]:
    """Yield an answer's text as it is generated; return its ids."""
    streamer: Any = _Streamer(model.lm.tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.ends = model.lm.text.ends
    results: list[Any] = []

    def work() -> None:
        try:
            results.extend(run(streamer=streamer))
        except Exception as error:  # it is raised where the answer is read
            results.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if isinstance(results[0], Exception):
        raise results[0]
    return list(results[0])


class _Streamer(TextIteratorStreamer):
    """Streams an answer's text without its end, which some tokenizers do not count as special.

    Attributes:
        ends: the ids that end an answer.
    """

    ends: Sequence[int] = ()

    def put(self, value: Any) -> None:
        """Take the prompt, then each token."""
        if self.next_tokens_are_prompt or int(value.reshape(-1)[0]) not in self.ends:
            cast(Any, super()).put(value)


def _source_of(model: Model, image: Any) -> Any:
    """Return an image, or what else the encoder reads, as an `ImageSource` that can be opened.

    Raises:
        MLLMError: it cannot be read.
    """
    source = video_source_of(image) if isinstance(image, list | tuple) else source_of(image)
    if model.encoder is None:
        source.open()
    else:
        model.encoder.open(source)
    return source
