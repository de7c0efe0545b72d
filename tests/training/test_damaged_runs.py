"""Files of a run that were damaged between a kill and its resume: the run that it would have been, or one message."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mllm
from mllm.errors import MLLMError
from mllm.testing import tiny_image
from mllm.training.checkpoint import NAME, TrainingState


class Killed(BaseException):
    """Ends training as a signal would."""


@pytest.fixture(scope="module")
def killed(tmp_path_factory, tiny_parts) -> tuple[Path, Path]:
    """Return a run that was killed after a checkpoint within a stage, and the same run as it would have been."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_image(0).save(folder / "0.png")
    (folder / "train.json").write_text(json.dumps([{"image": "0.png", "caption": "red"}]))
    (folder / "recipe.yaml").write_text(f"""
name: damaged
encoder: {{model: {tiny_parts[0]}}}
lm: {{model: {tiny_parts[1]}}}
connector: {{type: linear, tokens: 4}}
data: {{train: {{format: table, path: {folder}/train.json}}}}
stages: [{{name: one, train: [connector], steps: 6, batch_size: 1, checkpoint_every: 3}}]
""")
    write = TrainingState.write

    def written(state: TrainingState, path: Path) -> None:
        write(state, path)
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(TrainingState, "write", written)
        mllm.train(str(folder / "recipe.yaml"), out=folder / "run")
    return folder / "run", mllm.train(str(folder / "recipe.yaml"), out=folder / "whole").path


@pytest.fixture
def run(killed, tmp_path) -> Path:
    return Path(shutil.copytree(killed[0], tmp_path / "run"))


def resumed(run: Path, killed: tuple[Path, Path]) -> str:
    """Resume a run, whose model is that of the whole one; or return the message."""
    try:
        mllm.train(str(killed[0].parent / "recipe.yaml"), resume=run)
    except MLLMError as error:
        assert 20 < len(str(error)) < 10_000
        return str(error)
    for name in ("model/assembly.json", "log.jsonl"):
        assert (run / name).read_bytes() == (killed[1] / name).read_bytes()
    return ""


CONTENTS = {
    "empty": b"",
    "null": b"null",
    "a list": b"[]",
    "a number": b"1",
    "a cut object": b'{"one": ',
    "deep": b"[" * 100_000,
    "not UTF-8": b"\xff\xfe{}",
    "other keys": b'{"x": {"y": 1}}',
}


@pytest.mark.parametrize("name", ["recipe.yaml", "data.json", "environment.json", NAME])
@pytest.mark.parametrize("content", [*CONTENTS, "a folder", "a pipe"])
@pytest.mark.timeout(100)
def test_a_damaged_file_is_one_message_or_does_not_matter(run, killed, name, content):
    (run / name).unlink()
    if content == "a folder":
        (run / name).mkdir()
    elif content == "a pipe":
        os.mkfifo(run / name)
    else:
        (run / name).write_bytes(CONTENTS[content])
    message = resumed(run, killed)
    assert (name in message or "recipe changed" in message) if name != "environment.json" else not message


def test_a_damaged_log_is_named_by_its_line_and_a_cut_last_line_is_not(run, killed):
    intact = (run / "log.jsonl").read_bytes()
    for line in (b"{", b"[]", b"1", b"{}", b"\xff", b"[" * 100_000):
        (run / "log.jsonl").write_bytes(line + b"\n" + intact)
        assert "log.jsonl, line 1, is damaged" in resumed(run, killed)
    (run / "log.jsonl").write_bytes(intact + b'{"stage": "one", "st')
    assert resumed(run, killed) == ""


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no step": lambda header: header.pop("step"),
    "a step that is text": lambda header: header.update(step="x"),
    "a step before the first": lambda header: header.update(step=-1),
    "a stage that the recipe has not": lambda header: header.update(stage=7),
    "rates of other parts": lambda header: header.update(rates=[0.1, 0.1]),
    "rates that are none": lambda header: header.update(rates="x"),
    "a schedule that is none": lambda header: header.update(schedule=[]),
    "fingerprints that are none": lambda header: header.update(fingerprints=7),
}


@pytest.mark.parametrize("kind", [*HEADERS, "deep", "a list"])
def test_a_header_of_an_earlier_version_is_checked(run, killed, kind):
    """It has no checksum, so its values may be anything."""
    state = TrainingState.read(run)
    assert state is not None
    names = ("stage", "step", "schedule", "rates", "frozen", "waited", "fingerprints")
    header: Any = {**{name: getattr(state, name) for name in names}, "best": state.best_loss}
    if kind in HEADERS:
        HEADERS[kind](header)
    text = {"deep": "[" * 100_000, "a list": "[]"}.get(kind, json.dumps(header))
    save_file(load_file(run / NAME), run / NAME, metadata={"state": text})
    assert "checkpoint" in resumed(run, killed).lower()


@pytest.mark.parametrize("name", ["optimizer.0.exp_avg", "model.connector.project.weight", "random.0.cpu"])
def test_tensors_of_another_shape_are_one_message(run, killed, name):
    state = TrainingState.read(run)
    assert state is not None
    group, _, key = name.partition(".")
    tensors = {"optimizer": state.optimizer, "model": state.model, "random": state.random}[group]
    key = key if key in tensors else sorted(tensors)[0]
    tensors[key] = torch.zeros(3, dtype=tensors[key].dtype)
    state.write(run)
    assert "does not fit" in resumed(run, killed)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.timeout(60)
def test_a_log_that_is_no_file_is_named_and_not_waited_for(run, killed, make):
    (run / "log.jsonl").unlink()
    make(run / "log.jsonl")
    assert "log.jsonl" in resumed(run, killed)
