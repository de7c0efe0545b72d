"""An evaluation that is stopped or killed continues, and its folder is written by one process at a time."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mllm
from mllm.errors import MLLMError
from mllm.system import Lock
from mllm.testing import tiny_image

ITEMS = 60
FILES = ("predictions.jsonl", "summary.json")


@pytest.fixture(scope="module")
def work(tmp_path_factory, tiny_parts) -> tuple[Path, str, Path]:
    """Return a run, a suite of items that are answered one by one, and its uninterrupted evaluation."""
    folder = tmp_path_factory.mktemp("interrupted")
    rows = []
    for index in range(ITEMS):
        tiny_image(index).save(folder / f"{index}.png")
        rows.append({"image": f"{index}.png", "caption": f"number {index}"})
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "suite.yaml").write_text(f"""
name: slow
about: one item after another
data: {{format: table, path: {folder}/rows.json}}
answer: generate
metrics: [caption/bleu-1]
decoding: {{max_new_tokens: 20}}
batch_size: 1
""")
    run = mllm.assemble(tiny_parts[0], tiny_parts[1], {"type": "linear", "tokens": 4}).save(folder / "run")
    whole = mllm.evaluate(mllm.load(run), str(folder / "suite.yaml"), out=folder / "whole", run=str(run)).page
    assert whole is not None
    return Path(run), str(folder / "suite.yaml"), whole.parent


def answered(folder: Path) -> int:
    journal = folder / "answers.0.partial.jsonl"
    return len(journal.read_text().splitlines()) - 1 if journal.is_file() else 0


@pytest.fixture
def running(work, start, tmp_path) -> Any:
    """Return a process that is evaluating into ``out``, and has answered something."""
    run, suite, _ = work
    process = start("eval", run, "--suite", suite, "--out", tmp_path / "out")
    until = time.monotonic() + 200
    while answered(tmp_path / "out") < 3:
        assert time.monotonic() < until and process.running(), process.finish()
        time.sleep(0.002)
    return process


def continued(work: tuple[Path, str, Path], out: Path) -> None:
    run, suite, whole = work
    mllm.evaluate(mllm.load(run), suite, out=out, run=str(run))
    for name in FILES:
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert [path.name for path in out.iterdir() if path.name.startswith(".") or "partial" in path.name] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_what_is_answered_and_says_how_to_continue(work, running, tmp_path, number):
    output = running.stop(number)
    assert f"Continue with: mllm eval {work[0]} --suite {work[1]} --out {tmp_path / 'out'}" in output
    assert "Traceback" not in output and 3 <= answered(tmp_path / "out") < 2 * ITEMS
    continued(work, tmp_path / "out")


def test_a_folder_in_use_is_refused_and_one_of_a_dead_process_is_not(work, running, tmp_path):
    run, suite, _ = work
    with pytest.raises(MLLMError, match=r"is in use by process \d+ on"):
        mllm.evaluate(mllm.load(run), suite, out=tmp_path / "out", run=str(run))
    running.kill()
    for name in (".summary.json.abcdefgh", ".answers.0.partial.jsonl.12345678"):  # as a kill within a write leaves
        (tmp_path / "out" / name).write_bytes(b"cut short")
    continued(work, tmp_path / "out")


def test_an_error_leaves_no_folder_and_no_lock(work, tmp_path, monkeypatch):
    run, suite, _ = work
    model = mllm.load(run)

    def failing(*_: object) -> None:
        raise MLLMError("no answer today")

    answer: Callable[..., Any] = failing
    monkeypatch.setattr(model, "see_each", answer)
    with pytest.raises(MLLMError, match="no answer today"):
        mllm.evaluate(model, suite, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    other = tmp_path / "other"
    other.mkdir()
    lock = Lock(other)
    lock.acquire()
    with pytest.raises(MLLMError, match="is in use"):
        mllm.evaluate(mllm.load(run), suite, out=other)
    lock.release()
