"""A run that is killed goes on to what it would have been, bit for bit."""

from __future__ import annotations

import json
import tarfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import mllm
from mllm.encoders.feature_folder import features_folder
from mllm.encoders.feature_store import FeatureStore, open_store
from mllm.errors import MLLMError
from mllm.system import write
from mllm.testing import tiny_image
from mllm.training.checkpoint import NAME, TrainingState


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_parts):
    """Two stages; the second has dropout, a schedule, and every way of putting data together."""
    folder = tmp_path_factory.mktemp("resume")
    rows = []
    for index in range(20):
        tiny_image(index).save(folder / f"{index}.png")
        rows.append({"image": f"{index}.png", "caption": f"number {index}"})
    (folder / "train.json").write_text(json.dumps(rows))
    for shard in range(3):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for index in range(shard, 20, 3):
                (folder / f"{index}.txt").write_text(f"{index} in a tar " + "and so on " * (index % 4))
                archive.add(folder / f"{index}.png", f"{index}.png")
                archive.add(folder / f"{index}.txt", f"{index}.txt")
    (folder / "recipe.yaml").write_text(f"""
name: resumed
encoder: {{model: {tiny_parts[0]}}}
lm: {{model: {tiny_parts[1]}}}
connector: {{type: linear, tokens: 4, dropout: 0.3}}
adapters: [{{type: lora, r: 2, dropout: 0.2}}]
data: {{train: {{format: table, path: {folder}/train.json}}, val: {{format: table, path: {folder}/train.json}}}}
optim: {{schedule: cosine, warmup: 3}}
stages:
  - {{name: fit, fit: {{}}}}
  - {{name: one, train: {{connector: 0.01}}, steps: 7, batch_size: 3, checkpoint_every: 2}}
  - {{name: two, train: {{connector: 0.01, adapters: 0.003}}, steps: 60, batch_size: 3, checkpoint_every: 5, seed: 5,
     validate_every: 20, optim: {{accumulate: 2, weight_decay: 0.1, floor: 1.0e-4, warmup_start: 1.0e-5, horizon: 80}},
     data: {{group_by_length: 4, pack: 120, max_length: 100, skip: 1, augment: {{crop: [0.5, 1], flip: 0.5}}, train: [
       {{format: table, path: {folder}/train.json, concatenate: 0.5}},
       {{format: webdataset, path: {folder}, weight: 2}}]}}}}
""")
    return str(folder / "recipe.yaml")


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    return mllm.train(recipe, out=tmp_path_factory.mktemp("whole") / "run")


def log(path: Path) -> list[str]:
    return (path / "log.jsonl").read_text().splitlines()


@pytest.fixture
def killed(recipe, start):
    """Return a function that trains in another process, and kills it without notice once so many lines are logged."""

    def kill(folder: Path, lines: int) -> None:
        process, until = start("train", recipe, "--out", folder), time.monotonic() + 120
        while not (folder / "log.jsonl").is_file() or len(log(folder)) < lines:
            assert time.monotonic() < until and process.running(), process.finish()
            time.sleep(0.002)
        process.kill()

    return kill


@pytest.mark.parametrize("lines", [1, 4, 30])
def test_killed_and_resumed_it_is_the_run_it_would_have_been(recipe, whole, killed, tmp_path, lines):
    folder = tmp_path / "run"
    killed(folder, lines)
    assert not (folder / "model").exists()
    run = mllm.train(recipe, resume=folder)
    assert log(run.path) == log(whole.path)
    assert (run.path / "model/assembly.json").read_bytes() == (whole.path / "model/assembly.json").read_bytes()
    assert (run.path / "frozen.json").read_bytes() == (whole.path / "frozen.json").read_bytes()
    assert not (run.path / NAME).exists()
    with pytest.raises(MLLMError, match="is complete"):
        mllm.train(recipe, resume=folder)


def test_changed_data_or_a_changed_recipe_is_named_and_stops(recipe, killed, tmp_path):
    folder = tmp_path / "run"
    killed(folder, 30)
    with pytest.raises(MLLMError, match=r"(?s)--accept-changes.*stages\.2\.steps: 60 -> 30") as caught:
        mllm.train(recipe, ["stages.2.steps=30"], resume=folder)
    assert len(str(caught.value).splitlines()) == 2
    told = json.loads((folder / "data.json").read_text())
    assert [source["format"] for source in told["two"]] == ["table", "webdataset"]
    told["two"][0]["sha256"] = "other"
    (folder / "data.json").write_text(json.dumps(told))
    with pytest.raises(MLLMError, match=r"The data of stage two changed.*--accept-changes"):
        mllm.train(recipe, resume=folder)
    run = mllm.train(recipe, ["stages.2.steps=30"], resume=folder, accept_changes=True)
    assert json.loads(log(run.path)[-1])["step"] == 30
    assert mllm.config.loading.load(str(folder / "recipe.yaml")).stages[2].steps == 30


def test_what_is_no_run_or_damaged_is_said(recipe, killed, tmp_path):
    with pytest.raises(MLLMError, match="There is no run in"):
        mllm.train(recipe, resume=tmp_path)
    folder = tmp_path / "run"
    killed(folder, 10)
    (folder / NAME).write_bytes((folder / NAME).read_bytes()[:200])
    with pytest.raises(MLLMError, match="cannot be read"):
        mllm.train(recipe, resume=folder)


def test_a_write_that_fails_leaves_the_former_checkpoint(tmp_path, monkeypatch):
    TrainingState(1, 5, model={"x": torch.ones(2)}).write(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mllm.system.os.replace", full)
    with pytest.raises(MLLMError, match="No space left"):
        TrainingState(1, 6, model={"x": torch.zeros(2)}).write(tmp_path)
    monkeypatch.undo()
    state = TrainingState.read(tmp_path)
    assert state is not None and state.step == 5 and [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_checkpoint_keeps_its_layout(tmp_path):
    """A run of an earlier version, without fingerprints and a checksum, must resume."""
    names = ("model.connector.project.weight", "best.connector.project.weight", "optimizer.0.exp_avg", "random.0.cpu")
    tensors = {name: torch.full((2,), float(number)) for number, name in enumerate(names)}
    header = {"stage": 1, "step": 5, "schedule": {"last_epoch": 5}, "rates": [0.1], "frozen": {}, "best": 2.5}
    written = {**header, "waited": 3}
    save_file(tensors, tmp_path / NAME, metadata={"state": json.dumps(written)})
    state = TrainingState.read(tmp_path)
    assert state is not None and (state.stage, state.step, state.best_loss, state.waited) == (1, 5, 2.5, 3)
    assert [list(group) for group in (state.model, state.best, state.optimizer, state.random)] == [
        ["connector.project.weight"], ["connector.project.weight"], ["0.exp_avg"], ["0.cpu"]
    ]  # fmt: skip
    state.write(tmp_path)
    with safe_open(tmp_path / NAME, framework="pt") as file:
        assert json.loads(file.metadata()["state"]) == {**written, "fingerprints": {}}
        assert file.metadata().keys() == {"state", "sha256"}
        assert {name: file.get_tensor(name).tolist() for name in file.keys()} == {  # noqa: SIM118
            name: tensor.tolist() for name, tensor in tensors.items()
        }


def test_features_are_found_on_disk_and_only_where_nothing_changed(tiny_parts, monkeypatch):
    model = mllm.assemble(tiny_parts[0], tiny_parts[1])
    images = [tiny_image(seed) for seed in range(5)]
    store = open_store(model, "auto")
    first = store(images)
    store.flush()
    monkeypatch.setattr(model, "encoded", None)  # nothing may be computed from here on
    assert torch.equal(open_store(model, "on")(images[::-1]), first.flip(0))
    for changed in (
        mllm.assemble({"model": tiny_parts[0], "layer": -2}, tiny_parts[1]),
        mllm.assemble({"model": tiny_parts[0], "init": "random"}, tiny_parts[1]),
        mllm.assemble({"model": tiny_parts[0], "select": "all"}, tiny_parts[1]),
    ):
        assert features_folder(changed) != features_folder(model)
        assert not features_folder(changed).exists()


def test_without_a_cache_nothing_is_kept(tiny_parts):
    model = mllm.assemble(tiny_parts[0], tiny_parts[1])
    store = open_store(model, "off")
    store([tiny_image(0)])
    store.flush()
    assert not features_folder(model).exists()


@dataclass(frozen=True)
class Watched:
    """A picture that says in which thread it was opened."""

    seed: int
    threads: list[str] = field(default_factory=list, hash=False)

    def open(self):
        self.threads.append(threading.current_thread().name)
        if self.seed < 0:
            raise MLLMError("no picture")
        return tiny_image(self.seed)

    def key(self):
        return str(self.seed)


def test_pictures_that_are_expected_are_opened_once_in_threads(tiny_parts):
    model = mllm.assemble(tiny_parts[0], tiny_parts[1])
    store, images = FeatureStore(model), [Watched(seed) for seed in range(4)]
    store.expect(images)
    assert torch.equal(store(images), model.features([tiny_image(seed) for seed in range(4)]))
    assert all(len(image.threads) == 1 and "ThreadPool" in image.threads[0] for image in images)
    store.expect(images)  # their features are kept
    store(images)
    assert all(len(image.threads) == 1 for image in images)
    store.expect([Watched(-1)])
    with pytest.raises(MLLMError, match="no picture"):
        store([Watched(-1)])


def test_a_damaged_shard_is_computed_again(tiny_parts, tmp_path):
    model = mllm.assemble(tiny_parts[0], tiny_parts[1])
    store = FeatureStore(model, folder=tmp_path)
    expected = store([tiny_image(0)])
    store.flush()
    (shard,) = tmp_path.iterdir()
    write(shard, lambda file: file.write_bytes(b"cut short"))
    with pytest.warns(UserWarning, match="cannot be used"):
        assert torch.equal(FeatureStore(model, folder=tmp_path)([tiny_image(0)]), expected)
