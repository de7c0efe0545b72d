"""Two processes train what one does, each with the whole model or with a part of the frozen weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import mllm
from mllm.testing import tiny_image
from mllm.training.checkpoint import NAME

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "mllm", "train"]
SHARED = {"ACCELERATE_USE_FSDP": "true"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_parts) -> str:
    """Two stages on messages of which a third has no picture."""
    folder = tmp_path_factory.mktemp("processes")
    lines = []
    for index in range(16):
        tiny_image(index).save(folder / f"{index}.png")
        seen = index % 3 > 0
        question = {"role": "user", "content": ("<image>" if seen else "") + "What is it?"}
        answer = {"role": "assistant", "content": "red green blue white"[index % 4 :]}
        lines.append(json.dumps({"messages": [question, answer], "images": [f"{index}.png"] if seen else []}))
    (folder / "messages.jsonl").write_text("\n".join(lines))
    source = f"{{format: messages, path: {folder}/messages.jsonl, images: {folder}}}"
    path = folder / "recipe.yaml"
    path.write_text(f"""
name: processes
encoder: {{model: {tiny_parts[0]}}}
lm: {{model: {tiny_parts[1]}}}
connector: {{type: linear, tokens: 4}}
data: {{train: {source}, val: {source}}}
optim: {{schedule: constant, warmup: 0}}
stages:
  - {{name: align, train: {{connector: 1e-2}}, steps: 5, batch_size: 4, checkpoint_minutes: 1.0e-4}}
  - {{name: tune, adapters: [{{type: lora, r: 2}}], train: {{adapters: 1e-3, connector: 1e-3}}, steps: 8,
     batch_size: 4, checkpoint_every: 1}}
""")
    return str(path)


def log(path: Path, key: str) -> list[Any]:
    rows = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


@pytest.fixture(scope="module")
def two(request, recipe, start, tmp_path_factory) -> tuple[Path, bool]:
    """Return a run of two processes, and whether they shared the frozen weights."""
    folder = tmp_path_factory.mktemp("two") / "run"
    if request.param:
        start("train", recipe, "--out", folder, count=2, **SHARED).finish()
    else:  # by torchrun itself
        command = [*LAUNCH, recipe, "--out", str(folder)]
        settings = {**os.environ, "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return folder, request.param


@pytest.mark.parametrize("two", [False, True], ids=["ddp", "fsdp"], indirect=True)
@pytest.mark.timeout(200)
def test_two_processes_train_as_one_does(two, recipe, tmp_path):
    """The same global batches: equal losses, one run, and no process that waits for a picture it has not got."""
    path, fsdp = two
    mllm.train(recipe, out=tmp_path / "one")
    ran = [json.loads((place / "environment.json").read_text())["processes"] for place in (path, tmp_path / "one")]
    assert ran == ["2", "1"]  # else nothing is shown
    assert log(path, "divided_layers") == ([2, 2] if fsdp else [])
    for key in ("loss", "grad_norm", "val_loss"):
        assert log(path, key) == pytest.approx(log(tmp_path / "one", key), rel=1e-4)
    rows = [map(json.loads, (place / "speed.jsonl").read_text().splitlines()) for place in (path, tmp_path / "one")]
    images = [[row["images_per_s"] * row["seconds"] for row in each] for each in rows]
    assert images[0] == pytest.approx(images[1], rel=1e-3, abs=1e-3)  # those of all processes
    trained = [mllm.load(place).trained_state() for place in (path, tmp_path / "one")]
    torch.testing.assert_close(*trained, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("two", [True], ids=["fsdp"], indirect=True)
@pytest.mark.timeout(200)
def test_killed_and_resumed_they_are_the_run_they_would_have_been(two, recipe, start, tmp_path):
    whole, _ = two
    folder = tmp_path / "killed"
    process = start("train", recipe, "--out", folder, count=2, **SHARED)
    until = time.monotonic() + 100
    while not (folder / NAME).is_file() or len(log(folder, "loss")) < 8:
        assert time.monotonic() < until and process.running(), process.finish()
        time.sleep(0.005)
    process.kill()
    assert not (folder / "model").exists()
    alone = shutil.copytree(folder, tmp_path / "alone")
    start("train", recipe, "--resume", folder, count=2, **SHARED).finish()
    assert log(folder, "loss") == log(whole, "loss")
    mllm.train(recipe, resume=alone)
    assert log(alone, "processes_before") == [2] and log(alone, "processes") == [1]
    assert log(alone, "loss") == pytest.approx(log(whole, "loss"), rel=1e-4)


@pytest.mark.timeout(100)
def test_after_a_forward_pass_each_process_has_its_part_of_the_layers(tiny_parts):
    script = Path(__file__).parents[1] / "gpu" / "fsdp_states.py"
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "MASTER_PORT": "29773"}
    both = [
        subprocess.Popen(
            [sys.executable, str(script), tiny_parts[1], "cpu"],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [dict(line.split(" ", 1) for line in process.communicate()[0].splitlines()) for process in both]
    lm = transformers.AutoModelForCausalLM.from_pretrained(tiny_parts[1])
    layers = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in lm.model.layers]
    for each in printed:
        assert set(each["STATES"].split()) == {"SHARDED"}
        assert float(each["DIFFERENCE"]) < 1e-5, "from the logits of a model that is not divided"
        assert int(each["BYTES"]) == pytest.approx(sum(layers) / 2, rel=0.15)
