"""Steps with each optimizer setting are those of a plain torch loop with torch's own clipping and schedules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, MultiStepLR, PolynomialLR

import mllm
from mllm.config import loading
from mllm.config.recipe import OptimSpec
from mllm.errors import MLLMError
from mllm.prompts.batch import collate
from mllm.prompts.pieces import Target
from mllm.testing import tiny_image
from mllm.training.checkpoint import optimizer_state, set_optimizer
from mllm.training.optimizers import optimizer_for

STEPS = 6
RATES = {"connector": 0.02, "adapters": 0.003}
TEXTS = ["red", "two dogs", "a long road home", "x"]

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"schedule": "constant", "warmup": 0, "clip": None},
    "mapl": {"schedule": "constant", "warmup": 3, "warmup_start": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.3},
    "clipped": {"schedule": "constant", "warmup": 0, "clip": 0.05, "betas": [0.8, 0.98]},
    "blip2": {"schedule": "cosine", "warmup": 2, "warmup_start": 1e-3, "floor": 5e-3, "weight_decay": 0.3},
    "magma": {"schedule": "linear", "warmup": 2, "warmup_start": 1e-3, "horizon": 20},
    "gill": {"schedule": "step", "milestones": [2, 4], "factor": 0.1, "warmup": 0, "weight_decay": 0.3},
    "accumulated": {"schedule": "cosine", "warmup": 0, "accumulate": 2, "weight_decay": 0.3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images with a caption each: one batch is all of them, in any order."""
    folder = tmp_path_factory.mktemp("optimizer")
    for index in range(4):
        tiny_image(index).save(folder / f"{index}.png")
    rows = [{"image": f"{index}.png", "caption": text} for index, text in enumerate(TEXTS)]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def recipe(folder: Path, parts: tuple[str, str], optim: dict[str, Any], **stage: Any) -> str:
    batch = 4 // optim.get("accumulate", 1)
    content = {
        "name": "optimizer",
        "encoder": {"model": parts[0]},
        "lm": {"model": parts[1]},
        "connector": {"type": "linear", "tokens": 4, "norm": True},
        "adapters": [{"type": "lora", "r": 2}],
        "data": {"train": {"format": "table", "path": str(folder / "rows.json")}},
        "optim": {"precision": "float32", **optim},
        "stages": [{"name": "align", "train": RATES, "steps": STEPS, "batch_size": batch, **stage}],
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


@pytest.fixture(scope="module")
def start(folder: Path, tiny_parts: tuple[str, str]) -> Path:
    """Return a run whose trained tensors the others start from."""
    return mllm.train(recipe(folder, tiny_parts, {}), out=folder / "start").path


def rates(optim: dict[str, Any], rate: float) -> list[float]:
    """Return the learning rate of each step by torch's schedulers: one of warmup, and one of what follows."""

    def followed(make: Any, number: int) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
        scheduler, values = make(optimizer), []
        for _ in range(number):
            values.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return values

    warmup, length = optim.get("warmup", 0), optim.get("horizon", STEPS) - optim.get("warmup", 0)
    after: Any = {
        "constant": lambda optimizer: ConstantLR(optimizer, 1.0),
        "cosine": lambda optimizer: CosineAnnealingLR(optimizer, length, min(optim.get("floor", 0.0), rate)),
        "linear": lambda optimizer: PolynomialLR(optimizer, length),
        "step": lambda optimizer: MultiStepLR(optimizer, optim["milestones"], optim["factor"]),
    }[optim["schedule"]]
    rising: Any = lambda optimizer: LinearLR(optimizer, optim["warmup_start"] / rate, 1.0, warmup)  # noqa: E731
    first = followed(rising, warmup) if warmup else []
    return first + followed(after, STEPS - warmup)


def loss_of(model: Any, folder: Path) -> torch.Tensor:
    """Return the mean cross-entropy of the captions' tokens, by a forward pass of the transformers model."""
    rows = [[folder / f"{index}.png", "A picture of", Target(f" {text}")] for index, text in enumerate(TEXTS)]
    batch = collate([model.encode(row) for row in rows], model.lm.pad)
    embeds = model.embed(model.connector(model.features([row[0] for row in rows])), batch)
    positions = (batch.mask.cumsum(1) - 1).clamp(min=0)
    logits = model.lm.model(inputs_embeds=embeds, attention_mask=batch.mask, position_ids=positions).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100)


def trained_by_torch(start: Path, folder: Path, optim: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Return the tensors and losses of a plain loop."""
    model: Any = mllm.load(start).requires_grad_(False)
    groups: list[dict[str, Any]] = []
    for part, rate in RATES.items():
        for name, parameter in getattr(model, part).named_parameters():
            no_decay = "norm" in name or name.endswith("bias")
            decay = 0.0 if no_decay else optim.get("weight_decay", 0.0)
            groups.append({"params": [parameter.requires_grad_(True)], "lr": rate, "weight_decay": decay, "part": part})
    optimizer = torch.optim.AdamW(groups, betas=tuple(optim.get("betas", (0.9, 0.999))))
    planned = {part: rates(optim, rate) for part, rate in RATES.items()}
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = planned[group["part"]][step]
        loss = loss_of(model, folder)
        loss.backward()
        if (clip := optim.get("clip", 1.0)) is not None:
            torch.nn.utils.clip_grad_norm_([group["params"][0] for group in optimizer.param_groups], clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model.trained_state(), losses


@pytest.mark.parametrize("name", SETTINGS)
def test_a_stage_trains_as_a_plain_torch_loop(
    name: str, folder: Path, start: Path, tiny_parts: Any, tmp_path: Path
) -> None:
    optim = SETTINGS[name]
    run = mllm.train(recipe(folder, tiny_parts, optim, init={"from": str(start)}), out=tmp_path / "run")
    rows = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    expected, losses = trained_by_torch(start, folder, optim)
    assert [row["loss"] for row in rows if "loss" in row] == pytest.approx(losses, rel=1e-4)
    assert [row["lr"] for row in rows if "lr" in row][:-1] == pytest.approx(rates(optim, RATES["connector"])[1:])
    tensors = mllm.load(run.path).trained_state()
    torch.testing.assert_close(tensors, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "optim",
    [
        {"schedule": "step"},
        {"milestones": [5]},
        {"schedule": "step", "milestones": [5, 3]},
        {"schedule": "constant", "floor": 1e-5},
        {"schedule": "constant", "horizon": 9},
        {"schedule": "step", "milestones": [5], "horizon": 9},
        {"floor": -1.0},
    ],
)
def test_settings_that_contradict_each_other_are_refused(optim: dict[str, Any]) -> None:
    with pytest.raises(MLLMError, match="optim"):
        loading.load("limber-cpu", {f"optim.{key}": value for key, value in optim.items()})


@pytest.mark.parametrize("name", ["adamw", "adamw-8bit"])  # others need a GPU: tests/gpu/test_training.py
def test_an_optimizer_that_is_saved_continues_to_the_same_weights(name: Any) -> None:
    start = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))  # of 4096 numbers and more, 8 bits each

    def new() -> tuple[torch.nn.Parameter, Any]:
        weight = torch.nn.Parameter(start.clone())
        return weight, optimizer_for(OptimSpec(name=name), [{"params": [weight], "lr": 1e-2}])

    def step(weight: torch.nn.Parameter, optimizer: Any) -> None:
        optimizer.zero_grad()
        (weight.square().sum() / 2).backward()  # the gradient is the weight
        optimizer.step()

    weight, optimizer = new()
    step(weight, optimizer)
    assert torch.allclose(weight, start - 1e-2 * start.sign(), atol=1e-4), "AdamW's first step has the rate's size"
    again, continued = new()
    again.data.copy_(weight.data)
    saved = {key: tensor.clone() for key, tensor in optimizer_state(optimizer).items()}
    set_optimizer(continued, saved, [1e-2])
    step(weight, optimizer)
    step(again, continued)
    assert torch.equal(weight, again)
