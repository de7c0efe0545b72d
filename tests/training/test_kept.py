"""Checkpoints by step and by time, several of them, epochs, and the models of finished stages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import mllm
from mllm.errors import MLLMError
from mllm.planning.examples import epochs
from mllm.planning.plan import plan
from mllm.testing import tiny_image
from mllm.training.checkpoint import NAME, TrainingState
from mllm.training.kept import go_back

KEPT = ["checkpoint-1-2.safetensors", "checkpoint-1-3.safetensors", "checkpoint-1-4.safetensors"]


class Killed(BaseException):
    """Ends training as a signal would."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_parts) -> str:
    folder = tmp_path_factory.mktemp("kept")
    rows = []
    for index in range(9):
        tiny_image(index).save(folder / f"{index}.png")
        rows.append({"image": f"{index}.png", "caption": f"number {index}"})
    (folder / "train.json").write_text(json.dumps(rows))
    (folder / "recipe.yaml").write_text(f"""
name: kept
encoder: {{model: {tiny_parts[0]}}}
lm: {{model: {tiny_parts[1]}}}
connector: {{type: linear, tokens: 4, dropout: 0.3}}
data: {{train: {{format: table, path: {folder}/train.json}}}}
optim: {{warmup: 1}}
stages:
  - {{name: one, train: {{connector: 0.01}}, steps: 2, batch_size: 4}}
  - {{name: two, train: {{connector: 0.01}}, epochs: 2, batch_size: 3, checkpoint_every: null,
     checkpoint_minutes: 1.0e-9, keep_checkpoints: 3}}
""")
    return str(folder / "recipe.yaml")


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    return mllm.train(recipe, out=tmp_path_factory.mktemp("whole") / "run").path


@pytest.fixture(scope="module")
def stopped(recipe, tmp_path_factory) -> Path:
    """Return a run that was killed after the fourth step of its second stage."""
    write, folder = TrainingState.write, tmp_path_factory.mktemp("stopped") / "run"

    def written(state: TrainingState, path: Path) -> None:
        if (state.stage, state.step) == (1, 5):
            raise Killed
        write(state, path)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(TrainingState, "write", written)
        mllm.train(recipe, out=folder)
    return folder


@pytest.fixture
def run(stopped, tmp_path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def step_of(run: Path) -> int:
    state = TrainingState.read(run)
    assert state is not None
    return state.step


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("checkpoint*"))


def test_the_last_checkpoints_are_kept_by_time_and_none_of_a_complete_run(stopped, whole):
    assert names(stopped) == [*KEPT, NAME]
    assert [step_of(stopped), (stopped / NAME).stat().st_ino] == [4, (stopped / KEPT[2]).stat().st_ino]
    assert names(whole) == []


@pytest.mark.parametrize("name", ["", NAME, *KEPT])
def test_a_run_continues_from_each_of_them_bit_for_bit(recipe, run, whole, name):
    mllm.train(recipe, resume=run / name)
    for file in ("log.jsonl", "model/assembly.json", "stages/one/assembly.json", "frozen.json"):
        assert (run / file).read_bytes() == (whole / file).read_bytes()
    steps = [json.loads(line)["step"] for line in (run / "speed.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 1, 2, 3, 4, 5, 6] and names(run) == []


def test_what_is_after_a_checkpoint_that_is_gone_back_to_is_gone(run):
    go_back(run / KEPT[0])
    go_back(run / KEPT[0])  # nothing is left to do
    assert names(run) == [KEPT[0], NAME] and step_of(run) == 2
    assert [path for path in run.iterdir() if path.name.startswith(f".{NAME}")] == []


def test_a_file_system_without_links_keeps_copies(run, monkeypatch):
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("mllm.training.kept.os.link", refused)
    go_back(run / KEPT[1])
    assert names(run) == [*KEPT[:2], NAME] and step_of(run) == 3


def test_a_checkpoint_that_is_not_there_is_one_message(recipe, run):
    with pytest.raises(MLLMError, match=r"no checkpoint .*1-7.*1-2.*1-3.*1-4\.safetensors\."):
        mllm.train(recipe, resume=run / "checkpoint-1-7.safetensors")


def test_the_model_of_a_finished_stage_is_that_of_a_run_which_ends_there(recipe, stopped, whole, tmp_path):
    first = mllm.config.loading.load(recipe).stages[0].model_dump(mode="json", include={"name", "train", "steps"})
    alone = mllm.train(recipe, {"stages": [{**first, "batch_size": 4}]}, out=tmp_path / "alone").path
    expected = mllm.load(alone).trained_state()
    for run in (stopped, whole):  # also while the next one is trained
        torch.testing.assert_close(mllm.load(run / "stages/one").trained_state(), expected, rtol=0, atol=0)
    assert [path.name for path in (whole / "stages").iterdir()] == ["one"]  # the last stage's is the run's
    assert not (alone / "stages").exists()
    with pytest.raises(MLLMError, match=r"such as that of a stage: .*stages/one"):
        mllm.load(stopped)


def test_a_run_starts_from_the_model_of_a_stage(recipe, whole, tmp_path):
    changes = {
        "stages": [{"name": "next", "train": {"connector": 0}, "steps": 1, "batch_size": 2}],
        "init": {"from": str(whole / "stages/one")},
    }
    after = mllm.load(mllm.train(recipe, changes, out=tmp_path / "run").path).trained_state()
    expected = mllm.load(whole / "stages/one").trained_state()
    torch.testing.assert_close(after, expected, rtol=0, atol=0)


def test_epochs_are_steps_to_training_and_plan_alike(recipe, whole, tmp_path):
    """Two epochs of nine examples are six batches of three, with the learning rates of six steps."""
    changes = ["stages.1.epochs=null", "stages.1.steps=6", "stages.1.checkpoint_every=100"]
    steps = mllm.train(recipe, changes, out=tmp_path / "steps").path
    assert (steps / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
    assert [stage.steps for stage in plan(recipe).stages] == [2, 6]
    assert epochs(recipe) == ["two: 2 epochs of 9 examples are 6 steps."]
    assert mllm.config.loading.load(str(whole / "recipe.yaml")).stages[1].epochs == 2
