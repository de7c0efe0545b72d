"""LoRA that is killed and resumed, batches that are accumulated, and settings of LoRA that do not fit."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import mllm
from mllm.errors import MLLMError
from mllm.prompts.batch import collate
from mllm.prompts.pieces import Target
from mllm.testing import tiny_image

IMAGE = tiny_image(1)
STEPS, KILLED_AT = 6, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the data, the recipes and the runs."""
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def train(folder: Path, encoder: str, lm_folder: Callable[..., str]) -> Callable[..., Path]:
    """Return a function that trains LoRA on captions of very different lengths and on text alone; pad is EOS."""
    captions, turns = [], [("Say hi.", "Hi."), ("Say no.", "No, I will not.")]
    for index in range(9):
        tiny_image(index).save(folder / f"{index}.png")
        caption = f"a much longer caption of the image number {index}" if index % 3 == 0 else "a"
        captions.append({"image": f"{index}.png", "caption": caption})
    (folder / "captions.json").write_text(json.dumps(captions))
    conversations = [
        {"id": question, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
        for question, answer in turns
    ]
    (folder / "conversations.json").write_text(json.dumps(conversations))
    sources = [
        {"format": "table", "path": str(folder / "captions.json")},
        {"format": "llava", "path": str(folder / "conversations.json"), "images": str(folder), "weight": 0.5},
    ]
    lm = lm_folder("llama")

    def trained(name: str, batch_size: int = 2, dropout: float = 0.0, resume: Path | None = None, **optim: Any) -> Path:
        stage = {
            "name": "tune",
            "adapters": [{"type": "lora", "r": 4, "dropout": dropout}],
            "train": {"connector": 1e-3, "adapters": 1e-3},
            "steps": STEPS,
            "batch_size": batch_size,
            "checkpoint_every": 3,
        }
        recipe = {
            "name": name,
            "encoder": {"model": encoder},
            "lm": {"model": lm},
            "connector": {"type": "mlp", "tokens": 4},
            "data": {"train": sources},
            "optim": {"warmup": 2, **optim},
            "stages": [stage],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        place: dict[str, Any] = {"out": folder / name} if resume is None else {"resume": resume}
        return Path(mllm.train(str(folder / f"{name}.yaml"), **place).path)

    return trained


def losses(run: Path) -> dict[int, float]:
    rows = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def weights(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "model").glob("*.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def whole_and_resumed(train, folder):
    """A run, and one that continues from what of the first lay on disk at a step: all that is left of a killed run."""
    killed, steps = folder / "killed", 0

    def copies(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == KILLED_AT:
            shutil.copytree(folder / "whole", killed)

    handle = register_optimizer_step_pre_hook(copies)
    try:
        whole = train("whole", dropout=0.1, accumulate=2)
    finally:
        handle.remove()
    assert not (killed / "model").exists()
    assert max(losses(killed)) == KILLED_AT - 1
    return whole, train("whole", dropout=0.1, accumulate=2, resume=killed)


def test_the_losses_of_a_resumed_run_are_those_of_the_whole_run(whole_and_resumed):
    whole, resumed = whole_and_resumed
    assert len(losses(whole)) == STEPS
    assert losses(resumed) == losses(whole)


def test_the_weights_of_a_resumed_run_are_those_of_the_whole_run(whole_and_resumed):
    whole, resumed = map(weights, whole_and_resumed)
    assert any("lora" in name for name in whole)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


@pytest.fixture(scope="module")
def batch_of_4(train):
    return train("4", batch_size=4)


@pytest.mark.parametrize("batch_size", [2, 1])
def test_an_accumulated_batch_is_the_batch(train, batch_of_4, batch_size):
    run = train(f"{batch_size}x{4 // batch_size}", batch_size=batch_size, accumulate=4 // batch_size)
    assert losses(run) == pytest.approx(losses(batch_of_4), abs=2e-4)
    torch.testing.assert_close(weights(run), weights(batch_of_4), rtol=0, atol=2e-3)


def test_the_end_is_learned_though_the_pad_token_is_the_eos_token(model_of, encoded):
    model = model_of("llama")
    assert model.lm.pad == model.lm.eos
    rows = [encoded(model, [IMAGE, "A picture of", Target(text)]) for text in (" a", " a longer one")]
    labels = collate(rows, model.lm.pad).labels
    assert labels[:, -1].tolist() == [model.lm.eos] * 2
    assert (labels == model.lm.eos).sum(dim=1).tolist() == [1, 1]


def test_what_is_saved_and_loaded_scores_the_same(batch_of_4, tmp_path):
    model = mllm.load(batch_of_4)
    prompt, candidates = [tiny_image(3), "A picture of"], ["a", "b"]
    scores = model.score(prompt, candidates)
    assert mllm.load(model.save(tmp_path / "saved")).score(prompt, candidates) == scores


@pytest.mark.parametrize(
    "options",
    [
        {"targets": ["nope"]},
        {"targets": "q_proj"},
        {"targets": []},
        {"targets": ["q_proj", "nope"]},
        {"targets": ["lm_head"]},
        {"targets": ["embed_tokens"]},
        {"r": 0},
        {"r": -1},
        {"r": "x"},
        {"alpha": "x"},
        {"dropout": float("nan")},
        {"r": None},
        {"dropout": 2.0},
        {"alpha": 0},
    ],
    ids=repr,
)
def test_lora_is_made_or_refused_with_one_message(lm_folder, assemble, tmp_path, options):
    with contextlib.suppress(MLLMError):
        model = assemble(lm_folder("llama"), adapters=[{"type": "lora", **options}])
        assert any("lora" in name for name, _ in model.named_parameters())


def test_float16_on_a_cpu_trains_or_is_refused(train, fresh_accelerator):
    with contextlib.suppress(MLLMError):
        assert len(losses(train("float16", precision="float16"))) == STEPS
