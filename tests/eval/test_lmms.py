"""A run as a model of lmms-eval, in the environment of `make test-extras`: by lmms-eval's command, on test tasks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mllm.testing import tiny_image

pytestmark = pytest.mark.extras

TASK = """task: tiny_{kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {output}
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: {target}
{more}
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
metadata: {{version: 0.0}}
"""
UTILS = """from PIL import Image


def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")] if doc["image"] else []


def text(doc, *_, **__):
    return doc["question"]
"""
ROWS = [(0, "what is it"), (0, "how many"), (1, "what is it"), (None, "say something"), (1, "is it red or blue")]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for seed in (0, 1):
        tiny_image(seed).save(folder / f"{seed}.png")
    rows = [
        {"image": "" if seed is None else str(folder / f"{seed}.png"), "question": question, "answer": "x"}
        | {"choices": ["a cat", "two dogs"], "gold": 1}
        for seed, question in ROWS
    ]
    (folder / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "utils.py").write_text(UTILS)
    generate = "generation_kwargs: {max_new_tokens: 6, temperature: 0, until: ['~~']}"
    for kind, output, target, more, metric in (
        ("words", "generate_until", "answer", generate, "exact_match"),
        ("choices", "multiple_choice", "gold", "doc_to_choice: choices", "acc"),
    ):
        text = TASK.format(kind=kind, output=output, target=target, more=more, metric=metric, data=folder / "rows.json")
        (folder / f"tiny_{kind}.yaml").write_text(text)
    return folder


def lmms_eval(run: Path, task: Path, name: str, out: Path) -> list[dict[str, Any]]:
    """Run lmms-eval's command on a task, and return its samples in their order."""
    command = [sys.executable, "-m", "lmms_eval", "--model", "mllm", "--model_args", f"run={run},device=cpu"]
    command += ["--tasks", name, "--include_path", str(task), "--batch_size", "4", "--log_samples"]
    command += ["--output_path", str(out)]
    settings = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (file,) = out.rglob(f"*samples_{name}.jsonl")
    return sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda row: row["doc_id"])


def test_a_run_answers_lmms_evals_tasks(task: Path, tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model({"type": "linear", "tokens": 4})
    model.save(tmp_path / "run")
    samples = lmms_eval(tmp_path / "run", task, "tiny_words", tmp_path / "out")
    assert len(samples) == len(ROWS)
    for sample, (seed, question) in zip(samples, ROWS, strict=True):
        text = model.spec.prompt.question.format(question=question)
        prompt = [text] if seed is None else [task / f"{seed}.png", text]
        assert sample["filtered_resps"] == str(model.generate([prompt], max_new_tokens=6)[0])


def test_a_run_chooses_in_lmms_evals_tasks(task: Path, tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model({"type": "linear", "tokens": 4})
    model.save(tmp_path / "run")
    samples = lmms_eval(tmp_path / "run", task, "tiny_choices", tmp_path / "out")
    for sample, (seed, question) in zip(samples, ROWS, strict=True):
        text = model.spec.prompt.question.format(question=question)
        prompt = [text] if seed is None else [task / f"{seed}.png", text]
        first, second = model.score(prompt, ["a cat", "two dogs"], normalize=True)
        assert sample["acc"] == float(second > first)


def test_requests_in_any_order_with_any_settings(tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    Mllm = import_module("mllm.eval.lmms").Mllm

    model = tiny_model({"type": "linear", "tokens": 4})
    model.save(tmp_path / "run")
    ours = Mllm(str(tmp_path / "run"), prompt="Q {question} A", batch_size=2, device="cpu")
    ours.task_dict = {"t": {"s": [{"images": [tiny_image(0)]}, {"images": [tiny_image(1), tiny_image(0)]}]}}
    visual = lambda doc: doc["images"]  # noqa: E731
    asked = [(0, "one", 4), (1, "two", 7), (0, "three", 4), (0, "four", 7), (1, "five", 4)]
    requests = [SimpleNamespace(args=(q, {"max_new_tokens": n}, visual, doc, "t", "s")) for doc, q, n in asked]
    expected = [
        str(model.generate([[*ours.task_dict["t"]["s"][doc]["images"], f"Q {q} A"]], max_new_tokens=n)[0])
        for doc, q, n in asked
    ]
    assert ours.generate_until(requests) == expected
    full = expected[1]
    stop = {"max_new_tokens": 7, "until": [full[2]]}
    (cut,) = ours.generate_until([SimpleNamespace(args=("two", stop, visual, 1, "t", "s"))])
    assert cut == full[: full.index(full[2])].strip()


def test_the_bench_times_models_that_answer_the_same(tmp_path: Path) -> None:
    pytest.importorskip("decord", reason="lmms-eval's model for LLaVA imports decord")
    evaluate, shapes = (import_module(f"mllm.eval.bench.{name}") for name in ("evaluate", "shapes"))

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ours, stock = shapes.llava(tmp_path / "encoder", size=size)
    theirs = evaluate.alternative(ours, stock, tmp_path / "stock")
    row = evaluate.questions(ours, theirs, evaluate.items(1)[:2], repeats=1, progress=lambda line: None)
    assert row.ours > 0 and row.ratio == pytest.approx(row.ours / row.alternative)
