"""The rows of a batch: a request's job, and the text that is sent to it as its tokens are generated."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from mllm.lms.decoding import Decoding
from mllm.outputs import ImagePart, Output
from mllm.prompts.pieces import Piece


@dataclass(eq=False)
class Job:
    """One request.

    Attributes:
        prompt: the interleaved prompt.
        decoding: of it; see `Batcher.job`.
        send: is called with each piece of text, then with an `Answer`, or with an error; from the batcher's thread.
        cancelled: is set when nobody waits for the answer any more.
    """

    prompt: Sequence[Piece]
    decoding: Decoding
    send: Callable[[Any], None]
    cancelled: threading.Event = field(default_factory=threading.Event)


class PlacedImage(NamedTuple):
    """An image in an answer, and the number of characters of text before it."""

    at: int
    image: ImagePart


@dataclass(frozen=True)
class Answer:
    """A finished answer: its text, why it ended, and its numbers of tokens."""

    text: str
    finish_reason: str  # stop | length
    prompt_tokens: int
    completion_tokens: int
    images: tuple[PlacedImage, ...] = ()


class Row:
    """One row of a batch: its tokens become text that is sent as it is generated.

    Args:
        job: receives the text.
        lm: the language model.

    Attributes:
        ended: whether the whole answer was sent.
        tokens: how many were generated.
    """

    def __init__(self, job: Job, lm: Any) -> None:
        self.job, self._lm, self.ended, self.tokens = job, lm, False, 0
        stops = job.decoding.stop_strings or []
        self._stops: list[str] = [stops] if isinstance(stops, str) else list(stops)
        self._sent = ""
        self.restart()

    def restart(self) -> None:
        """Begin the answer again; the text that was sent of it is not sent again."""
        self._ids: list[int] = []
        self._complete = False

    def put(self, token: int) -> None:
        """Take the next token."""
        self._complete = self._complete or token in self._lm.text.ends
        if self._complete:
            return
        self._ids.append(token)
        text = self._text()
        limit = self.job.decoding.max_new_tokens
        self._complete = any(stop in text for stop in self._stops) or (limit is not None and len(self._ids) >= limit)
        held = max((len(stop) - 1 for stop in self._stops), default=0)  # characters that may start a stop string
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character's bytes are incomplete
            self._send(text[: len(text) - held])

    def finish(self, output: Output) -> None:
        """Send the rest of the text, and the whole answer with its images."""
        text = self._text() if self._ids else str(output)
        for stop in self._stops:
            text = text.partition(stop)[0]
        text = text.rstrip()
        self._send(text)
        images, before = [], 0
        for part in output:
            if isinstance(part, ImagePart):
                images.append(PlacedImage(min(before, len(text)), part))
            else:
                before += len(part)
        prompt_tokens = len(self.job.decoding.prompt or ())
        self.tokens = output.num_tokens
        self.job.send(Answer(text, output.finish_reason, prompt_tokens, output.num_tokens, tuple(images)))
        self.ended = True

    def _text(self) -> str:
        return str(self._lm.decode(self._ids)).lstrip()

    def _send(self, text: str) -> None:
        for stop in self._stops:
            text = text.partition(stop)[0]
        text = text.rstrip()  # spaces wait for the next word: an answer does not end with one
        if len(text) > len(self._sent) and text.startswith(self._sent):
            self.job.send(text[len(self._sent) :])
            self._sent = text


class Rows(BaseStreamer):
    """Passes the tokens of a batch on to its rows."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows, self._prompt = rows, True

    def put(self, value: Tensor) -> None:
        """Take one token of each row ``(B,)``; the first call has the prompt."""
        if self._prompt:
            self._prompt = False
            return
        for row, token in zip(self._rows, value.tolist(), strict=True):
            row.put(token)

    def end(self) -> None:
        """Do nothing: no token is held back."""
