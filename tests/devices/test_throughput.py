"""A step waits for the device once, with the loss: what else is measured comes with it."""

from __future__ import annotations

import json

import torch

import mllm
from mllm.testing import tiny_image


def test_measuring_a_step_adds_no_synchronization(gpu, tiny_parts, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")
    tiny_image(0).save(tmp_path / "0.png")
    (tmp_path / "train.json").write_text(json.dumps([{"image": "0.png", "caption": "red " * n} for n in (1, 2, 3, 4)]))
    (tmp_path / "recipe.yaml").write_text(f"""
name: waits
encoder: {{model: {tiny_parts[0]}}}
lm: {{model: {tiny_parts[1]}}}
connector: {{type: linear, tokens: 4}}
data: {{train: {{format: table, path: {tmp_path}/train.json}}}}
optim: {{schedule: constant, warmup: 0}}
stages: [{{name: one, train: [connector], steps: 5, batch_size: 2}}]
""")
    run = mllm.train(str(tmp_path / "recipe.yaml"), out=tmp_path / "run").path
    waits = [(name, place) for name, place in gpu.synchronizations if "/training/" in place]
    reads = sum(gpu.synchronizations[wait] for wait in waits if wait[0] == "tolist" and "/loop.py" in wait[1])
    assert reads == 5 and not [wait for wait in waits if "throughput" in wait[1] or "setup" in wait[1]], waits
    rows = [json.loads(line) for line in (run / "speed.jsonl").read_text().splitlines()]
    assert len(rows) == 5 and all(row["mfu"] > 0 and row["peak_gib"] == 1 for row in rows)
