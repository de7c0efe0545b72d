"""Decode requests that arrive together in one batch, on the one thread that uses the model.

A request is checked before it is in a batch, and a batch that fails is decoded again row by row, so that one request
never harms another. Notable: a job receives its text as it is generated; one that was cancelled ends at the next token.
"""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from mllm.answering.decode import answer, for_prompts, make_decoding
from mllm.answering.generate import FORMER, answer_prompts
from mllm.answering.with_images import answer_with_images
from mllm.errors import MLLMError, renamed_options
from mllm.lms.decoding import Decoding, check_batch
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

    def job(self, prompt: Sequence[Piece], options: Mapping[str, Any], send: Callable[[Any], None], limit: int) -> Job:
        """Return a request, decoded with the recipe's options and the request's over them.

        Args:
            prompt: the interleaved prompt.
            options: those that may differ within a batch.
            send: see `Job`.
            limit: of new tokens, whatever the options say.

        Raises:
            MLLMError: an invalid value, options that do not fit together, or an answer that does not fit into the
                context.
        """
        decoding = make_decoding(self._model, {"kind": "question", **options})
        check_batch([decoding])
        if decoding.nearest_words is None:  # which makes another prompt
            (decoding,) = for_prompts(self._model, [prompt], [decoding])
        tokens = min(decoding.max_new_tokens or limit, limit)
        # With a seed, an answer that is decoded again after a failure of its batch is the same.
        seed = secrets.randbits(62) if decoding.samples and decoding.seed is None else decoding.seed
        return Job(prompt, replace(decoding, max_new_tokens=tokens, seed=seed), send)

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
            self._run([Row(job, self._model.lm) for job in jobs])

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

    def _run(self, rows: Sequence[Row]) -> None:
        """Decode rows in one batch; where that fails, one by one, so that an error reaches only the row it is of."""
        rows = [row for row in rows if not row.ended and not row.job.cancelled.is_set()]
        if not rows:
            return
        try:
            decodings = [replace(row.job.decoding, cancelled=row.job.cancelled.is_set) for row in rows]
            outputs = self._answers([row.job.prompt for row in rows], decodings, rows)
            for row, output in zip(rows, outputs, strict=True):
                row.finish(output)
        except Exception as error:
            if len(rows) == 1:
                rows[0].job.send(error)
                return
            for row in rows:
                row.restart()
                self._run([row])

    def _answers(
        self, prompts: Sequence[Sequence[Piece]], decodings: Sequence[Decoding], rows: Sequence[Row]
    ) -> list[Output]:
        """Return the answers; their tokens are streamed to the rows unless they are known at the end only."""
        model, first = self._model, decodings[0]
        if first.selects:
            show = self._show or {"images": 0}
            pairs = zip(prompts, decodings, strict=True)
            return [answer_prompts(model, [prompt], decoding, **show)[0] for prompt, decoding in pairs]
        streamer = None if first.num_beams > 1 else _Rows(rows)
        if self._show is None:
            return answer(model, prompts, decodings, streamer=streamer)
        return answer_with_images(model, prompts, decodings, count=1, streamer=streamer, **self._show)


class Row:
    """One row of a batch: its tokens become text that is sent as it is generated.

    Args:
        job: receives the text.
        lm: the language model.

    Attributes:
        ended: whether the whole answer was sent.
    """

    def __init__(self, job: Job, lm: Any) -> None:
        self.job, self._lm, self.ended = job, lm, False
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
