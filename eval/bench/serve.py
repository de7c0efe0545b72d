"""Time a server's clients with an engine, next to the static batches of `transformers` on the same parts."""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mllm.eval.bench.generate import QUESTION, THINGS
from mllm.eval.bench.shapes import LM, noise_images
from mllm.eval.bench.table import Row, report

from mllm.assembling import assemble
from mllm.assembly import Assembly
from mllm.build import load
from mllm.capabilities import RunsOnEngine
from mllm.prompts.pieces import arrange
from mllm.serve.batcher import Batcher
from mllm.serve.forwarder import Forwarder
from mllm.serve.rows import Answer

CLIENTS = (16, 64)
TOKENS = 32  # of an answer
LATE = 3.0  # the target: a late request's first token comes as many times sooner


def run(
    *,
    out: Path | None = None,
    repeats: int = 3,
    progress: Callable[[str], None] = print,
    engine: Any = "vllm",
    clients: Sequence[int] = CLIENTS,
) -> list[Row]:
    """Run all measurements, print the table, and write it to ``out``."""
    with tempfile.TemporaryDirectory() as folder:
        assemble({"model": "mllm/mobilenet-v2", "select": "pooled"}, LM, {"type": "linear", "tokens": 4}).save(folder)
        models = [load(folder, dtype="float32", engine=which) for which in (engine, None)]
        rows = [row for count in clients for row in measured(models, count, repeats=repeats, progress=progress)]
    report("serve", rows, out)
    return rows


def measured(
    models: Sequence[Assembly], count: int, *, repeats: int, progress: Callable[[str], None], tokens: int = TOKENS
) -> list[Row]:
    """Return the rows of a number of clients, of two models that answer in turns: with an engine and without."""
    times: list[list[tuple[float, float]]] = [[], []]
    for repeat in range(repeats + 1):
        for number, model in enumerate(models):
            rate, late = once(model, count, tokens)
            progress(f"{count} clients, {('engine', 'transformers')[number]}: {rate:.2f} requests/s, late {late:.2f} s")
            if repeat:  # the first is to warm up
                times[number].append((rate, late))
    (rate, late), (other_rate, other_late) = (map(statistics.median, zip(*pairs, strict=True)) for pairs in times)
    return [
        Row(f"{count} clients at once", "requests/s", rate, other_rate, rate / other_rate, 1.0),
        Row(
            f"first token of a late request, {count} clients", "1/s", 1 / late, 1 / other_late, other_late / late, LATE
        ),
    ]


def once(model: Assembly, count: int, tokens: int) -> tuple[float, float]:
    """Return the requests per second of clients that ask at once, and the seconds to a late request's first token.

    The late request is sent when the first token of the others comes.
    """
    decoder = Forwarder if isinstance(model.lm, RunsOnEngine) else Batcher
    batcher = decoder(model, size=count)
    done, begun, first = threading.Semaphore(0), threading.Event(), threading.Event()
    failed: list[Exception] = []

    def take(event: Any, late: bool) -> None:
        (first if late else begun).set()
        if isinstance(event, Exception):
            failed.append(event)
        if isinstance(event, Answer | Exception):
            done.release()

    def ask(image: Any, number: int, late: bool = False) -> None:
        prompt = arrange(model.spec.prompt.template, [image], QUESTION.format(THINGS[number % len(THINGS)]))
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        batcher.submit(batcher.job(prompt, options, lambda event: take(event, late), tokens))

    images = noise_images(count + 1)
    started = time.perf_counter()
    for number, image in enumerate(images[:count]):
        ask(image, number)
    begun.wait()
    sent = time.perf_counter()
    ask(images[count], count, late=True)
    first.wait()
    late = time.perf_counter() - sent
    for _ in range(count + 1):
        done.acquire()
    seconds = time.perf_counter() - started
    batcher.close()
    if failed:
        raise failed[0]
    return (count + 1) / seconds, late
