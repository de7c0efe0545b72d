"""Time answers to many questions on an image, a second turn, and a server's clients, next to `transformers`' LLaVA."""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from mllm.eval.bench.shapes import LM, image_token, llava, noise_images
from mllm.eval.bench.table import Row, paired, ratio, report

from mllm.assembling import assemble
from mllm.assembly import Assembly
from mllm.errors import MLLMError
from mllm.prompts.pieces import arrange
from mllm.serve.batcher import Batcher
from mllm.serve.rows import Answer

QUESTION = "Question: is there a {} in the picture or is it not there? Answer:"  # some 14 tokens
THINGS = (
    *("cat", "dog", "bus", "car", "tree", "cup", "man", "bed", "ball"),
    *("boat", "bird", "fish", "door", "lamp", "book", "desk", "chair", "clock"),
)
TOKENS = 4  # of an answer
SHAPES = ((5, 8, 3.4), (18, 4, 8.0))  # questions on an image, images, the target ratio


def run(*, out: Path | None = None, repeats: int = 3, progress: Callable[[str], None] = print) -> list[Row]:
    """Run all measurements, print the table, and write it to ``out``."""
    with tempfile.TemporaryDirectory() as folder:
        ours, stock = llava(Path(folder))
        agree(ours, stock, progress)
        rows = [questions(ours, stock, *shape, repeats=repeats, progress=progress) for shape in SHAPES]
        rows.append(second_turn(ours, stock, repeats=repeats, progress=progress))
    rows.append(clients(repeats=repeats, progress=progress))
    report("generate", rows, out)
    return rows


def agree(ours: Assembly, stock: Any, progress: Callable[[str], None]) -> None:
    """Check that both models generate the same greedy tokens on a few prompts.

    Raises:
        MLLMError: they do not.
    """
    answers = _ours(ours, noise_images(2), [QUESTION.format(thing) for thing in THINGS[:2]])
    expected = _theirs(ours, stock, _requests(ours, noise_images(2), 2))
    if answers != expected:
        raise MLLMError(
            f"The two models answer differently, so their times cannot be compared: {answers} and {expected}."
        )
    progress("both answer the same")


def questions(
    ours: Assembly, stock: Any, each: int, images: int, wanted: float, *, repeats: int, progress: Callable[[str], None]
) -> Row:
    """Time ``each`` questions on each of ``images`` images; both sides batched."""
    opened = noise_images(images)
    texts = [QUESTION.format(thing) for thing in THINGS[:each]]
    requests = _requests(ours, opened, each)  # the alternative's preprocessing is not timed; ours is
    progress(f"{each} questions on each of {images} images")
    mine, theirs = paired(
        lambda: _ours(ours, opened, texts), lambda: _theirs(ours, stock, requests), repeats=repeats, progress=progress
    )
    count = each * images
    return Row(
        name=f"{each} questions per image, {images} images",
        unit="questions/s",
        ours=count / statistics.median(mine),
        alternative=count / statistics.median(theirs),
        ratio=ratio(mine, theirs),
        wanted=wanted,
        bound=bound(ours, each, len(ours.lm.tokenize(texts[0]))),
    )


def bound(model: Assembly, each: int, question: int) -> float:
    """Return the bound of the ratio by FLOPs: two for each weight and token, without attention."""
    tower = sum(p.numel() for p in model.encoder.parameters()) * (model.connector.num_tokens + 1)
    body = sum(p.numel() for p in model.lm.parameters())
    rest = body * (question + TOKENS - 1)
    prefix = tower + body * model.tokens_per_image
    return each * (prefix + rest) / (prefix + each * rest)


def second_turn(ours: Assembly, stock: Any, *, repeats: int, progress: Callable[[str], None]) -> Row:
    """Time the first token of a second question on an image: a continued conversation, and the whole read again."""
    first, second = (QUESTION.format(thing) for thing in THINGS[:2])
    (image,) = noise_images(1)
    times: list[float] = []

    def mine() -> None:
        chat = ours.chat()
        chat.send(first, [image], max_new_tokens=TOKENS, min_new_tokens=TOKENS)
        started = time.perf_counter()
        chat.send(second, max_new_tokens=1)
        times.append(time.perf_counter() - started)

    whole = " ".join([first, "x " * TOKENS, second])
    inputs = _inputs(ours, [(ours.encoder.preprocess([image]), whole)])
    progress("the first token of a second turn")
    _, theirs = paired(mine, lambda: _generate(stock, inputs, 1), repeats=repeats, progress=progress)
    return Row(
        name="first token of a second turn on the image",
        unit="answers/s",
        ours=1 / statistics.median(times[1:]),
        alternative=1 / statistics.median(theirs),
        ratio=ratio(times[1:], theirs),
        wanted=5.0,
    )


def clients(*, count: int = 16, tokens: int = 32, repeats: int, progress: Callable[[str], None]) -> Row:
    """Time requests that arrive together and the same ones after one another, with the embedded parts."""
    encoder = {"model": "mllm/mobilenet-v2", "select": "pooled"}
    model = assemble(encoder, {"model": LM, "dtype": "float32"}, {"type": "linear", "tokens": 4})
    prompts = [arrange(model.spec.prompt.template, [image], QUESTION.format("cat")) for image in noise_images(count)]
    batcher = Batcher(model, size=count)

    def ask(prompt: Sequence[Any]) -> None:
        done = threading.Event()
        settings = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        batcher.submit(
            batcher.job(prompt, settings, lambda news: done.set() if isinstance(news, Answer) else None, tokens)
        )
        done.wait()

    def together() -> None:
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(ask, prompts))

    progress(f"{count} clients of a server")
    mine, theirs = paired(together, lambda: list(map(ask, prompts)), repeats=repeats, progress=progress)
    batcher.close()
    return Row(
        name=f"{count} clients at once",
        unit="answers/s",
        ours=count / statistics.median(mine),
        alternative=count / statistics.median(theirs),
        ratio=ratio(mine, theirs),
        wanted=3.0,
        note=f"compared with one after another; embedded parts, answers of {tokens} tokens",
    )


def _ours(model: Assembly, images: Sequence[Any], texts: Sequence[str]) -> list[str]:
    views = model.see_each([[image] for image in images])
    answers = views.continue_with([texts] * len(images), max_new_tokens=TOKENS, min_new_tokens=TOKENS)
    return [answer for row in answers for answer in row]


def _requests(model: Assembly, images: Sequence[Any], each: int) -> list[tuple[torch.Tensor, str]]:
    pixels = [model.encoder.preprocess([image]) for image in images]
    return [(image, QUESTION.format(thing)) for image in pixels for thing in THINGS[:each]]


def _theirs(model: Assembly, stock: Any, requests: Sequence[tuple[torch.Tensor, str]], batch: int = 16) -> list[str]:
    answers: list[str] = []
    for start in range(0, len(requests), batch):
        inputs = _inputs(model, requests[start : start + batch])
        rows = _generate(stock, inputs, TOKENS)
        answers += [model.lm.decode(row).strip() for row in rows[:, inputs["input_ids"].shape[1] :].tolist()]
    return answers


def _inputs(model: Assembly, requests: Sequence[tuple[torch.Tensor, str]]) -> dict[str, torch.Tensor]:
    """Return the alternative's batch: an image's tokens, then the question, padded on the left."""
    visual = [image_token(model)] * model.tokens_per_image
    rows = [[*visual, *model.lm.tokenize(text)] for _, text in requests]
    width = max(map(len, rows))
    ids = torch.tensor([[model.lm.eos] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.cat([pixels for pixels, _ in requests])}
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


@torch.no_grad()
def _generate(stock: Any, inputs: dict[str, torch.Tensor], tokens: int) -> torch.Tensor:
    return stock.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
