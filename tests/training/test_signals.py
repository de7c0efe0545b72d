"""A signal stops training at the end of a step; a run is trained by one process; kills leave no litter."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from pathlib import Path

import pytest

import mllm
from mllm.errors import MLLMError
from mllm.system import Lock, remove_partial
from mllm.testing import tiny_image
from mllm.training.checkpoint import NAME
from mllm.training.signals import Interrupted

STEPS = 30


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_parts) -> str:
    folder = tmp_path_factory.mktemp("signals")
    rows = []
    for index in range(8):
        tiny_image(index).save(folder / f"{index}.png")
        rows.append({"image": f"{index}.png", "caption": f"number {index}"})
    (folder / "train.json").write_text(json.dumps(rows))
    (folder / "recipe.yaml").write_text(f"""
name: signals
encoder: {{model: {tiny_parts[0]}}}
lm: {{model: {tiny_parts[1]}}}
connector: {{type: linear, tokens: 4, dropout: 0.3}}
data: {{train: {{format: table, path: {folder}/train.json}}}}
stages: [{{name: one, train: {{connector: 0.01}}, steps: {STEPS}, batch_size: 4, checkpoint_every: 1000}}]
""")
    return str(folder / "recipe.yaml")


def log(path: Path) -> list[str]:
    file = path / "log.jsonl"
    return file.read_text().splitlines() if file.is_file() else []


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    return mllm.train(recipe, out=tmp_path_factory.mktemp("whole") / "run").path


def when_logged(folder: Path, process, lines: int) -> None:
    until = time.monotonic() + 200
    while len(log(folder)) < lines:
        assert time.monotonic() < until and process.running(), process.finish()
        time.sleep(0.002)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_the_run_continues_bit_for_bit(recipe, whole, start, tmp_path, number):
    folder = tmp_path / "run"
    process = start("train", recipe, "--out", folder)
    when_logged(folder, process, 3)
    output = process.stop(number)
    assert f"--resume {folder}" in output and "Traceback" not in output
    assert (folder / NAME).is_file() and 3 <= len(log(folder)) < STEPS
    done = len(log(folder))
    mllm.train(str(folder / "recipe.yaml"), resume=folder)  # as the message says
    assert log(folder) == log(whole) and done < STEPS
    for name in ("model/assembly.json", "frozen.json"):  # with the SHA-256 of the tensors
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_two_processes_stop_after_the_same_step_where_one_gets_the_signal(recipe, start, tmp_path):
    folder = tmp_path / "run"
    process = start("train", recipe, "--out", folder, count=2)
    when_logged(folder, process, 3)
    process.stop(signal.SIGTERM, rank=1)
    assert (folder / NAME).is_file() and len(log(folder)) < STEPS
    start("train", recipe, "--resume", folder, count=2).finish()
    start("train", recipe, "--out", tmp_path / "whole", count=2).finish()
    assert log(folder) == log(tmp_path / "whole")


def test_a_signal_outside_of_a_step_is_one_message_too(recipe, tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the handler did not stop it")

    monkeypatch.setattr("mllm.training.train.run_stage", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=r"Stopped by SIGTERM.*--resume") as caught:
        mllm.train(recipe, out=tmp_path / "run")
    assert caught.value.status == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before


def test_a_run_in_use_is_refused_and_one_of_a_dead_process_is_not(recipe, start, tmp_path):
    folder = tmp_path / "run"
    process = start("train", recipe, "--out", folder)
    when_logged(folder, process, 3)
    with pytest.raises(MLLMError, match=r"is in use by process \d+ on"):
        mllm.train(recipe, resume=folder)
    with pytest.raises(MLLMError, match=r"is in use|is not empty"):
        mllm.train(recipe, out=folder)
    process.kill()
    for name in (f".{NAME}.abcdefgh", ".log.jsonl.12345678"):  # as a kill within a write leaves
        (folder / name).write_bytes(b"cut short")
    mllm.train(recipe, resume=folder)
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_the_lock_is_the_systems_and_is_released(tmp_path):
    lock = Lock(tmp_path)
    lock.acquire()
    with (tmp_path / Lock.NAME).open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    other = Lock(tmp_path)
    with pytest.raises(MLLMError, match=rf"in use by process {os.getpid()} on"):
        other.acquire()
    lock.release()
    assert list(tmp_path.iterdir()) == []
    other.acquire()
    other.release()


def test_a_folder_that_is_refused_stays_as_it_was(recipe, tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(MLLMError, match="is not empty"):
        mllm.train(recipe, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["mine"]


def test_only_files_of_unfinished_writes_are_removed(tmp_path):
    kept = [".gitignore", ".lock", ".hidden.json", "a.abcdefgh", "log.jsonl"]
    for name in [*kept, ".log.jsonl.a1b2c3d_"]:
        (tmp_path / name).touch()
    remove_partial(tmp_path, older_than=60)
    assert (tmp_path / ".log.jsonl.a1b2c3d_").exists()
    remove_partial(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
