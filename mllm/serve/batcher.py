"""Requests that arrive together are decoded together, by the one thread that uses the model.

Notable: a job is told of its text as it grows; one that nobody waits for any more ends at the next token.
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

from mllm.answering.decode import answer, decodings
from mllm.answering.with_images import shown
from mllm.errors import MLLMError
from mllm.outputs import ImagePart, Output
from mllm.prompts.pieces import Piece


class Full(MLLMError):
    """More requests wait than may wait."""


@dataclass
class Job:
    """One request.

    Attributes:
        prompt: the interleaved prompt.
        decoding: its settings; those that may differ within a batch.
        tell: is called with each piece of text, then with an `Answer`, or with an error; from the batcher's thread.
    """

    prompt: Sequence[Piece]
    decoding: dict[str, Any]
    tell: Callable[[Any], None]
    gone: threading.Event = field(default_factory=threading.Event)


class Shown(NamedTuple):
    """An image in an answer, and how many characters of its text stand before it."""

    at: int
    image: ImagePart


@dataclass(frozen=True)
class Answer:
    """A finished answer: its whole text, why it ended, and what it cost in tokens."""

    text: str
    finish_reason: str  # stop | length
    prompt_tokens: int
    completion_tokens: int
    images: tuple[Shown, ...] = ()


class Batcher:
    """Decodes jobs in batches.

    Args:
        model: the assembly; nothing else may use it meanwhile.
        size: jobs of a batch, at most.
        waiting: jobs that may wait.
        gather: seconds for which a first job waits for others.
        show: ``index`` and ``eager`` of answers with images, see `mllm.model.Assembly.generate`; None: words alone.
    """

    def __init__(
        self,
        model: Any,
        *,
        size: int = 16,
        waiting: int = 64,
        gather: float = 0.01,
        show: Mapping[str, Any] | None = None,
    ) -> None:
        self._model, self._size, self._gather, self._show = model, size, gather, show
        self._waiting: queue.Queue[Job | None] = queue.Queue()
        self._room = threading.BoundedSemaphore(waiting)
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Put a job behind those that wait.

        Raises:
            Full: as many wait as may wait.
        """
        if not self._room.acquire(blocking=False):
            raise Full("The server is busy: too many requests wait already. Try again soon.")
        self._waiting.put(job)

    def close(self) -> None:
        """Finish what waits, then stop."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while jobs := self._next():
            jobs = [job for job in jobs if not job.gone.is_set()]
            try:
                if jobs:
                    self._run(jobs)
            except Exception as error:  # the next batch is decoded all the same
                for job in jobs:
                    job.tell(error)

    def _next(self) -> list[Job]:
        """Return the jobs of the next batch; none: the end."""
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
        rows = [Row(job, model.lm, len(model.encode(job.prompt).ids)) for job in jobs]
        prompts = [job.prompt for job in jobs]
        own = {"num_beams": 1}  # text is told as it grows, which beams cannot
        settings = decodings(model, prompts, [{**own, **job.decoding, "cancelled": job.gone.is_set} for job in jobs])
        for row, chosen in zip(rows, settings, strict=True):
            row.limit = chosen.get("max_new_tokens")
        if self._show is None:
            outputs = answer(model, prompts, settings, streamer=_Rows(rows))
        else:
            outputs = shown(model, prompts, settings, count=1, streamer=_Rows(rows), **self._show)
        for row, output in zip(rows, outputs, strict=True):
            row.finish(output)


class Row:
    """One row of a batch: its tokens become text that is told as it grows."""

    def __init__(self, job: Job, lm: Any, prompt_tokens: int) -> None:
        self._job, self._lm, self._prompt_tokens = job, lm, prompt_tokens
        self._ids: list[int] = []
        self._told = ""
        self._stops: list[str] = job.decoding.get("stop_strings") or []
        self._reason: str | None = None
        self.limit: int | None = None

    def put(self, token: int) -> None:
        """Take the next token."""
        if self._reason is not None:
            return
        if token == self._lm.eos:
            self._reason = "stop"
            return
        self._ids.append(token)
        text = self._text()
        if any(stop in text for stop in self._stops):
            self._reason = "stop"
        elif self.limit is not None and len(self._ids) >= self.limit:
            self._reason = "length"
        held = max((len(stop) - 1 for stop in self._stops), default=0)  # may turn out to start a stop string
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character's bytes are not all there yet
            self._tell(text[: len(text) - held])

    def finish(self, output: Output) -> None:
        """Tell what is left, and the whole answer with its images."""
        text = self._text()
        for stop in self._stops:
            text = text.partition(stop)[0]
        text = text.rstrip()
        self._tell(text)
        images, before = [], 0
        for part in output:
            if isinstance(part, ImagePart):
                images.append(Shown(min(before, len(text)), part))
            else:
                before += len(part)
        reason = self._reason or "length"
        self._job.tell(Answer(text, reason, self._prompt_tokens, len(self._ids), tuple(images)))

    def _text(self) -> str:
        return str(self._lm.decode(self._ids)).lstrip()

    def _tell(self, text: str) -> None:
        for stop in self._stops:
            text = text.partition(stop)[0]
        text = text.rstrip()  # spaces wait for a word behind them: an answer has none at its end
        if len(text) > len(self._told) and text.startswith(self._told):
            self._job.tell(text[len(self._told) :])
            self._told = text


class _Rows(BaseStreamer):
    """Hands each row its tokens."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows, self._prompt = rows, True

    def put(self, value: Tensor) -> None:
        """Take one token of each row ``(B,)``; what comes first is the prompt."""
        if self._prompt:
            self._prompt = False
            return
        for row, token in zip(self._rows, value.tolist(), strict=True):
            row.put(token)

    def end(self) -> None:
        """Nothing is held back here."""
