"""Decode requests that arrive together in one batch, on the one thread that uses the model.

Notable: a job receives its text as it is generated; one that was cancelled ends at the next token.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from mllm.answering.decode import answer, make_decoding
from mllm.answering.generate import FORMER
from mllm.answering.with_images import answer_with_images
from mllm.errors import MLLMError, renamed_options
from mllm.model import Model
from mllm.outputs import ImagePart, Output
from mllm.prompts.pieces import Piece


class Full(MLLMError):
    """The queue of requests is full."""


@dataclass
class Job:
    """One request.

    Attributes:
        prompt: the interleaved prompt.
        options: of its decoding; those that may differ within a batch.
        send: is called with each piece of text, then with an `Answer`, or with an error; from the batcher's thread.
        cancelled: is set when nobody waits for the answer any more.
    """

    prompt: Sequence[Piece]
    options: dict[str, Any]
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


class Batcher:
    """Decodes jobs in batches.

    Args:
        model: the model; nothing else may use it meanwhile.
        size: jobs of a batch, at most.
        waiting: jobs in the queue, at most.
        gather: seconds for which a first job waits for others.
        show: ``index`` and ``image_logit_bias`` of answers with images, see `mllm.assembly.Assembly.generate`; None:
            text alone.
    """

    def __init__(
        self,
        model: Model,
        *,
        size: int = 16,
        waiting: int = 64,
        gather: float = 0.01,
        show: Mapping[str, Any] | None = None,
    ) -> None:
        self._model, self._size, self._gather = model, size, gather
        self._show = None if show is None else renamed_options(show, FORMER)
        self._waiting: queue.Queue[Job | None] = queue.Queue()
        self._room = threading.BoundedSemaphore(waiting)
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Put a job at the end of the queue.

        Raises:
            Full: the queue is full.
        """
        if not self._room.acquire(blocking=False):
            raise Full("The server is busy: too many requests wait already. Try again soon.")
        self._waiting.put(job)

    def close(self) -> None:
        """Finish the queue, then stop."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while jobs := self._next():
            jobs = [job for job in jobs if not job.cancelled.is_set()]
            try:
                if jobs:
                    self._run(jobs)
            except Exception as error:  # the next batch is decoded all the same
                for job in jobs:
                    job.send(error)

    def _next(self) -> list[Job]:
        """Return the jobs of the next batch; none when the batcher is closed."""
        first = self._waiting.get()
        if first is None:
            return []
        self._room.release()
        jobs, until = [first], time.monotonic() + self._gather
        while len(jobs) < self._size:
            try:
                job = self._waiting.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if job is None:
                self._waiting.put(None)  # after this batch
                break
            self._room.release()
            jobs.append(job)
        return jobs

    def _run(self, jobs: Sequence[Job]) -> None:
        model = self._model
        prompts = [job.prompt for job in jobs]
        decodings = [
            # Without beams, whose text cannot be sent as it is generated.
            make_decoding(model, {"num_beams": 1, **job.options, "cancelled": job.cancelled.is_set})
            for job in jobs
        ]
        rows = [
            Row(job, model.lm, len(model.encode(job.prompt).ids), decoding.max_new_tokens)
            for job, decoding in zip(jobs, decodings, strict=True)
        ]
        if self._show is None:
            outputs = answer(model, prompts, decodings, streamer=_Rows(rows))
        else:
            outputs = answer_with_images(model, prompts, decodings, count=1, streamer=_Rows(rows), **self._show)
        for row, output in zip(rows, outputs, strict=True):
            row.finish(output)


class Row:
    """One row of a batch: its tokens become text that is sent as it is generated.

    Args:
        job: receives the text.
        lm: the language model.
        prompt_tokens: of the prompt.
        limit: of new tokens.
    """

    def __init__(self, job: Job, lm: Any, prompt_tokens: int, limit: int | None) -> None:
        self._job, self._lm, self._prompt_tokens, self._limit = job, lm, prompt_tokens, limit
        self._ids: list[int] = []
        self._sent = ""
        self._stops: list[str] = job.options.get("stop_strings") or []
        self._reason: str | None = None

    def put(self, token: int) -> None:
        """Take the next token."""
        if self._reason is not None:
            return
        if token in self._lm.text.ends:
            self._reason = "stop"
            return
        self._ids.append(token)
        text = self._text()
        if any(stop in text for stop in self._stops):
            self._reason = "stop"
        elif self._limit is not None and len(self._ids) >= self._limit:
            self._reason = "length"
        held = max((len(stop) - 1 for stop in self._stops), default=0)  # characters that may start a stop string
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character's bytes are incomplete
            self._send(text[: len(text) - held])

    def finish(self, output: Output) -> None:
        """Send the rest of the text, and the whole answer with its images."""
        text = self._text()
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
        reason = self._reason or "length"
        self._job.send(Answer(text, reason, self._prompt_tokens, len(self._ids), tuple(images)))

    def _text(self) -> str:
        return str(self._lm.decode(self._ids)).lstrip()

    def _send(self, text: str) -> None:
        for stop in self._stops:
            text = text.partition(stop)[0]
        text = text.rstrip()  # spaces wait for the next word: an answer does not end with one
        if len(text) > len(self._sent) and text.startswith(self._sent):
            self._job.send(text[len(self._sent) :])
            self._sent = text


class _Rows(BaseStreamer):
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
