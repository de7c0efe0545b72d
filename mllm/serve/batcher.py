"""Decode requests that arrive together in one batch, on the one thread that uses the model.

A request is checked before it is in a batch, and a batch that fails is decoded again row by row, so that one request
never harms another. Notable: a job receives its text as it is generated; one that was cancelled leaves the queue at
once, or ends at the next token.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from mllm.answering.decode import answer, for_prompts, make_decoding
from mllm.answering.generate import FORMER, answer_prompts
from mllm.answering.with_images import answer_with_images
from mllm.errors import renamed_options
from mllm.lms.decoding import Decoding, check_batch
from mllm.model import Model
from mllm.outputs import Output
from mllm.prompts.pieces import Piece
from mllm.serve.metrics import Metrics
from mllm.serve.rows import Job, Row, Rows


class Batcher:
    """Decodes jobs in batches.

    Args:
        model: the model; nothing else may use it meanwhile.
        size: jobs of a batch, at most.
        gather: seconds for which a first job waits for others.
        show: ``index`` and ``image_logit_bias`` of answers with images, see `mllm.assembly.Assembly.generate`; None:
            text alone.
        metrics: counts batches and tokens.
    """

    def __init__(
        self,
        model: Model,
        *,
        size: int = 16,
        gather: float = 0.01,
        show: Mapping[str, Any] | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._model, self._size, self._gather = model, size, gather
        self._show = None if show is None else renamed_options(show, FORMER)
        self._metrics = metrics or Metrics()
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()  # of the queue
        self._closed = threading.Event()
        self.running = 0
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

    @property
    def waiting(self) -> int:
        """Return how many jobs wait for their batch."""
        return len(self._queue)

    def submit(self, job: Job) -> None:
        """Put a job at the end of the queue."""
        with self._changed:
            self._queue.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Remove a job from the queue, or end it at the next token; one that is answered stays as it is."""
        job.cancelled.set()
        with self._changed, contextlib.suppress(ValueError):
            self._queue.remove(job)

    def close(self, seconds: float | None = None) -> None:
        """Cancel all jobs, and wait for the end of the batch that is decoded.

        Args:
            seconds: to wait for it, at most.
        """
        with self._changed:
            self._closed.set()
            self._queue.clear()
            self._changed.notify()
        self._thread.join(seconds)

    def _work(self) -> None:
        while not self._closed.is_set():
            self._decode(self._next())  # without a name here, which would keep its images until the next batch

    def _decode(self, jobs: Sequence[Job]) -> None:
        """Decode a batch, and count it."""
        rows = [Row(job, self._model.lm) for job in jobs]
        started, self.running = time.monotonic(), len(rows)
        self._run(rows)
        self.running = 0
        if rows:
            self._metrics.batch(len(rows), time.monotonic() - started, sum(row.tokens for row in rows))

    def _next(self) -> list[Job]:
        """Return the jobs of the next batch, in the order in which they came; none if all of them were cancelled."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed.is_set())
            self._changed.wait_for(lambda: len(self._queue) >= self._size or self._closed.is_set(), self._gather)
            return [self._queue.popleft() for _ in range(min(self._size, len(self._queue)))]

    def _run(self, rows: Sequence[Row]) -> None:
        """Decode rows in one batch; where that fails, one by one, so that an error reaches only the row it is of."""
        rows = [row for row in rows if not row.ended and not self._is_cancelled(row.job)]
        if not rows:
            return
        try:
            decodings = [replace(row.job.decoding, cancelled=partial(self._is_cancelled, row.job)) for row in rows]
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

    def _is_cancelled(self, job: Job) -> bool:
        return job.cancelled.is_set() or self._closed.is_set()

    def _answers(
        self, prompts: Sequence[Sequence[Piece]], decodings: Sequence[Decoding], rows: Sequence[Row]
    ) -> list[Output]:
        """Return the answers; their tokens are streamed to the rows unless they are known at the end only."""
        model, first = self._model, decodings[0]
        if first.selects:
            show = self._show or {"images": 0}
            pairs = zip(prompts, decodings, strict=True)
            return [answer_prompts(model, [prompt], decoding, **show)[0] for prompt, decoding in pairs]
        streamer = None if first.num_beams > 1 else Rows(rows)
        if self._show is None:
            return answer(model, prompts, decodings, streamer=streamer)
        return answer_with_images(model, prompts, decodings, count=1, streamer=streamer, **self._show)
