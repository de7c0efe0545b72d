"""A disk that is full is one message that names the file, and what was written before is still there.

The system refuses to let files grow (RLIMIT_FSIZE), as it does on a full disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import mllm
from mllm.cli.terminal import converse
from mllm.encoders.feature_store import FeatureStore
from mllm.errors import MLLMError
from mllm.outputs import ImagePart, Output, with_files
from mllm.scorers.index import ImageIndex
from mllm.testing import tiny_image
from mllm.training.checkpoint import TrainingState
from mllm.training.run import Run
from tests.fuzz.disk import full_disk

Journal: Any = import_module("mllm.eval.journal").Journal


def _flush(model: Any, folder: Path) -> None:
    store = FeatureStore(model, folder=folder)
    store([tiny_image(0)])
    store.flush()


WRITERS: dict[str, Callable[[Any, Path], Any]] = {
    "log": lambda _, folder: Run(folder).log(step=1),
    "record": lambda _, folder: Run(folder).record("time.json", {}),
    "checkpoint": lambda _, folder: TrainingState(1, 5, model={"x": torch.ones(2)}).write(folder),
    "model": lambda model, folder: model.save(folder / "model"),
    "features": _flush,
    "journal": lambda _, folder: Journal(folder, {}).put("0", ["a"]),
    "conversation": lambda model, folder: model.chat().save(folder / "chat.json"),
    "image": lambda _, folder: with_files(Output([ImagePart(Image.new("RGB", (8, 8)))]), folder),
    "index": lambda _, folder: ImageIndex(torch.ones(1, 2), ["a.png"], "m").save(folder / "index.safetensors"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_each_writer_names_its_file_and_leaves_no_partial_one(tiny_model, tmp_path, writer):
    model = tiny_model()
    with pytest.raises(MLLMError, match=str(tmp_path)), full_disk():
        WRITERS[writer](model, tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) == 0
    assert [path.name for path in tmp_path.rglob(".*") if path.is_file()] == []


def test_training_shows_the_first_error_and_continues_when_there_is_space(tiny_parts, tmp_path):
    tiny_image(0).save(tmp_path / "0.png")
    (tmp_path / "train.json").write_text(json.dumps([{"image": "0.png", "caption": "red"}]))
    (tmp_path / "recipe.yaml").write_text(f"""
name: full
encoder: {{model: {tiny_parts[0]}}}
lm: {{model: {tiny_parts[1]}}}
connector: {{type: linear, tokens: 4}}
data: {{train: {{format: table, path: {tmp_path}/train.json}}}}
cache: off
stages: [{{name: one, train: [connector], steps: 4, batch_size: 1, checkpoint_every: 2}}]
""")
    recipe, folder = str(tmp_path / "recipe.yaml"), tmp_path / "run"
    with pytest.raises(MLLMError, match=r"checkpoint\.safetensors cannot be written"), full_disk(5000):
        mllm.train(recipe, out=folder)
    whole = mllm.train(recipe, out=tmp_path / "whole")
    run = mllm.train(recipe, resume=folder)
    for name in ("log.jsonl", "model/assembly.json"):
        assert (run.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_a_conversation_that_cannot_be_saved_continues(tiny_model, tmp_path, monkeypatch, capsys):
    lines = iter(
        ["What is it?", "/save /nonexistent/x.json", f"/save {tmp_path}/{'x' * 300}", f"/save {tmp_path}/ok.json"]
    )
    monkeypatch.setattr("builtins.input", lambda _="": next(lines, "/exit"))
    converse(tiny_model().chat(), max_new_tokens=2)
    assert capsys.readouterr().out.count("cannot be written") == 2
    assert [message["role"] for message in json.loads((tmp_path / "ok.json").read_text())] == ["user", "assistant"]
