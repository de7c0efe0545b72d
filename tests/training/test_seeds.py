"""A stage's own seed decides what that stage draws, and nothing that an earlier stage drew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mllm
from mllm.build import build
from mllm.config import loading
from mllm.data.sources import read_all
from mllm.hub.fingerprints import tensor_hash
from mllm.saving import about
from mllm.testing import tiny_image
from mllm.training.batches import training_sources

ONE = "{name: one, train: {connector: 0.01}, steps: 3, batch_size: 4}"
ADAPTER = "adapters: [{type: bottleneck, reduction: 4}], train: {adapters: 1.0e-9}, steps: 3, batch_size: 4"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_parts: tuple[str, str]) -> str:
    """A recipe whose frozen parts have random weights too, drawn with the recipe's seed 3."""
    folder = tmp_path_factory.mktemp("seeds")
    rows = []
    for index in range(16):
        tiny_image(index).save(folder / f"{index}.png")
        rows.append({"image": f"{index}.png", "caption": [f"number {index}", f"the {index}th"]})
    (folder / "train.json").write_text(json.dumps(rows))
    (folder / "recipe.yaml").write_text(f"""
name: seeds
encoder: {{model: {tiny_parts[0]}, init: random}}
lm: {{model: {tiny_parts[1]}, init: random}}
connector: {{type: linear, tokens: 4}}
data: {{train: {{format: table, path: {folder}/train.json, fraction: 0.5}}}}
optim: {{schedule: constant, warmup: 0}}
seed: 3
stages: [{ONE}]
""")
    return str(folder / "recipe.yaml")


def trained(recipe: str, out: Path, *stages: str) -> Any:
    return mllm.train(recipe, [f"stages=[{', '.join(stages)}]"], out=out)


def losses(run: Any, stage: str) -> list[float]:
    rows = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["stage"] == stage and "loss" in row]


def test_a_stage_without_a_seed_has_the_recipes(recipe: str, tmp_path: Path) -> None:
    silent = trained(recipe, tmp_path / "silent", ONE, f"{{name: two, {ADAPTER}}}")
    explicit = trained(recipe, tmp_path / "explicit", ONE, f"{{name: two, seed: 3, {ADAPTER}}}")
    assert (silent.path / "log.jsonl").read_bytes() == (explicit.path / "log.jsonl").read_bytes()
    assert about(silent.path) == about(explicit.path)


def test_a_stages_seed_changes_that_stage_and_no_other(recipe: str, tmp_path: Path) -> None:
    two = "train: {connector: 0.01}, steps: 3, batch_size: 4"
    plain = trained(recipe, tmp_path / "plain", ONE, f"{{name: two, {two}}}", f"{{name: three, {two}}}")
    seeded = trained(recipe, tmp_path / "seeded", ONE, f"{{name: two, seed: 7, {two}}}", f"{{name: three, {two}}}")
    assert losses(plain, "one") == losses(seeded, "one")
    assert losses(plain, "two") != losses(seeded, "two")
    stages = loading.load(str(seeded.path / "recipe.yaml")).stages
    assert [stage.seed for stage in stages] == [3, 7, 3]
    items = [[item.id for item in training_sources(stage)[0].items] for stage in stages]
    assert items[0] == items[2] != items[1]  # the fraction of the data that is read
    assert items[1] == [item.id for item in read_all(stages[1].data.train, seed=7)[0].items]


def test_new_parts_are_drawn_with_the_stages_seed_and_others_are_carried_over(recipe: str, tmp_path: Path) -> None:
    run = trained(recipe, tmp_path / "run", ONE, f"{{name: two, seed: 7, {ADAPTER}}}")
    first = mllm.load(trained(recipe, tmp_path / "first", ONE).path)
    model = mllm.load(run.path)  # which rebuilds the frozen parts, and compares their fingerprints
    assert tensor_hash(model.encoder) == tensor_hash(first.encoder)
    assert model.frozen_hash("lm") == first.frozen_hash("lm")
    assert tensor_hash(model.connector) == tensor_hash(first.connector)
    spec = about(run.path).spec
    assert (spec.seed, spec.seeds) == (7, {"encoder": 3, "lm": 3})
    drawn = {seed: build(spec.model_copy(update={"seed": seed})).adapters[0].state_dict() for seed in (3, 7)}
    adapter = model.adapters[0].state_dict()
    differs = {
        seed: {k for k in adapter if not torch.allclose(adapter[k], drawn[seed][k], atol=1e-6)} for seed in drawn
    }
    assert not differs[7] and differs[3]
