"""Pass the server's requests on to an engine as they come: which of them run together is the engine's matter.

Requests that arrive together are encoded in one batch. A client that disconnects cancels its request at the engine.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

from mllm.answering.decode import output_of, submitted
from mllm.lms.decoding import Decoding
from mllm.serve.batcher import Batcher
from mllm.serve.rows import Job, Row


class Forwarder(Batcher):
    """Answers jobs by the model's engine; ``size`` of them are there at the same time, at most."""

    def _decode(self, jobs: Sequence[Job]) -> None:
        """Encode jobs together, and queue them at the engine."""
        rows = [Row(job, self._model.lm) for job in jobs if not self._is_cancelled(job)]
        self._finish(len(jobs) - len(rows))
        self._forward(rows)

    def _next(self) -> list[Job]:
        """Return the jobs that wait, as many as the engine may have in addition."""
        with self._changed:
            self._changed.wait_for(lambda: (self._queue and self.running < self._size) or self._closed.is_set())
            room = self._size - self.running
            self._changed.wait_for(lambda: len(self._queue) >= room or self._closed.is_set(), self._gather)
            jobs = [self._queue.popleft() for _ in range(min(room, len(self._queue)))]
            self.running += len(jobs)
            return jobs

    def _forward(self, rows: Sequence[Row]) -> None:
        """Queue rows at the engine; where that fails, one by one, so that an error reaches only the row it is of."""
        if not rows:
            return
        if rows[0].job.decoding.selects:  # several answers, of which one is selected
            self._run(rows)
            self._finish(len(rows))
            return
        decodings = [replace(row.job.decoding, cancelled=partial(self._is_cancelled, row.job)) for row in rows]
        try:
            answers = submitted(
                self._model, [row.job.prompt for row in rows], decodings, [partial(_put, row) for row in rows]
            )
        except Exception as error:
            if len(rows) == 1:
                rows[0].job.send(error)
                self._finish(1)
                return
            for row in rows:
                self._forward([row])
            return
        for row, (future, decoding) in zip(rows, answers, strict=True):
            future.add_done_callback(partial(self._answered, row, decoding, time.monotonic()))

    def _answered(self, row: Row, decoding: Decoding, started: float, future: Future[list[int]]) -> None:
        """Send a row its answer, or the engine's error."""
        try:
            row.finish(output_of(self._model, self._model.lm.answer_ids(future), decoding))
            self._metrics.batch(1, time.monotonic() - started, row.tokens)
        except Exception as error:
            row.job.send(error)
        self._finish(1)

    def _finish(self, count: int) -> None:
        """Make room for other jobs."""
        with self._changed:
            self.running -= count
            self._changed.notify()


def _put(row: Row, ids: list[int]) -> None:
    for token in ids:
        row.put(token)
