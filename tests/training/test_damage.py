"""A changed byte is found wherever training reads what it wrote, and so are other frozen parts."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mllm
from mllm.encoders.feature_folder import features_folder
from mllm.encoders.feature_store import FeatureStore, open_store
from mllm.errors import MLLMError
from mllm.hub.verified import save_verified
from mllm.planning.check import problems
from mllm.testing import tiny_encoder, tiny_image, tiny_lm
from mllm.training.checkpoint import NAME, TrainingState
from mllm.training.kept import Checkpoints
from mllm.transfer import transfer
from tests.fuzz.folders import killed_after


def flipped(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


@pytest.fixture
def state() -> TrainingState:
    return TrainingState(
        stage=1,
        step=5,
        model={"connector.project.weight": torch.arange(6.0).reshape(2, 3), "x": torch.zeros(0), "y": torch.ones(())},
        optimizer={"0.step": torch.tensor(5.0)},
        random={"0.cpu": torch.arange(8, dtype=torch.uint8)},
        schedule={"last_epoch": 5},
        rates=[0.1],
        frozen={"one": {"before": {"lm": "a"}, "after": {"lm": "a"}}},
        fingerprints={"lm": "b"},
    )


def content(state: TrainingState) -> str:
    """The whole state as text."""
    return json.dumps(vars(state), default=lambda tensor: [str(tensor.dtype), tensor.tolist()])


def test_every_flipped_bit_of_a_checkpoint_is_found(state, tmp_path):
    state.write(tmp_path)
    assert (read := TrainingState.read(tmp_path)) is not None and content(read) == content(state)
    intact = (tmp_path / NAME).read_bytes()
    accepted = 0
    for position in range(len(intact)):
        (tmp_path / NAME).write_bytes(intact)
        flipped(tmp_path / NAME, position, bit=position % 7)
        try:
            read = TrainingState.read(tmp_path)
        except MLLMError as error:
            assert "Remove it to start the run from its beginning" in str(error)
        else:  # a space between two names of the header became another one
            assert read is not None and content(read) == content(state)
            accepted += 1
    assert accepted < 8


def test_a_shard_with_a_flipped_bit_is_computed_again(tiny_model, tmp_path):
    model, images = tiny_model(), [tiny_image(seed) for seed in range(3)]
    store = FeatureStore(model, folder=tmp_path)
    expected = store(images)
    store.flush()
    (shard,) = tmp_path.iterdir()
    flipped(shard, -1)
    with pytest.warns(UserWarning, match=rf"{shard} cannot be used: .*checksum.*computed again"):
        again = FeatureStore(model, folder=tmp_path)
        assert torch.equal(again(images), expected)
    again.flush()
    last = FeatureStore(model, folder=tmp_path)
    assert torch.equal(last(images), expected)  # without a warning
    last.flush()
    shard = min(tmp_path.iterdir())
    save_file({name: row + 1 for name, row in load_file(shard).items()}, shard)  # without a checksum
    with pytest.warns(UserWarning, match="contains no checksum"):
        assert torch.equal(FeatureStore(model, folder=tmp_path)(images), expected)


def test_a_shard_of_another_shape_is_computed_again(tiny_model, tmp_path):
    model, images = tiny_model(), [tiny_image(seed) for seed in range(2)]
    store = FeatureStore(model, folder=tmp_path)
    expected = store(images)
    store.flush()
    (shard,) = tmp_path.iterdir()
    save_verified(shard, {name: row[:1].clone() for name, row in load_file(shard).items()})
    with pytest.warns(UserWarning, match="another shape"):
        assert torch.equal(FeatureStore(model, folder=tmp_path)(images), expected)


def test_features_under_the_key_of_an_earlier_version_are_not_used(tiny_parts, tiny_model):
    model, image = tiny_model(), tiny_image(1)
    weights = hashlib.sha256(hashlib.sha256((Path(tiny_parts[0]) / "model.safetensors").read_bytes()).digest())
    key = {"weights": weights.hexdigest(), "kind": "VisionModel", "dtypes": ["torch.float32"]}
    text = json.dumps({**key, "settings": model.encoder.settings()}, sort_keys=True, default=str)
    former = features_folder(model).parent / hashlib.sha256(text.encode()).hexdigest()[:32]
    former.mkdir(parents=True)
    features = model.features([image])
    save_file({model.encoder.key(mllm.media.images.source_of(image)): features[0] + 1}, former / "x.safetensors")
    with pytest.warns(UserWarning, match=rf"{former} are of an earlier version.*computed again"):
        store = open_store(model, "auto")
    assert torch.equal(store([image]), features)
    store.flush()
    open_store(model, "auto")  # without a warning


@pytest.mark.parametrize("position", [3, 40, -1])
def test_parts_of_another_run_are_taken_from_intact_files_only(position, tiny_model, tmp_path, recipe):
    run = tiny_model().save(tmp_path / "source")
    (tensors,) = Path(run).glob("*.safetensors")
    transfer(tiny_model(), Path(run))
    flipped(tensors, position)
    for read in (lambda: transfer(tiny_model(), Path(run)), lambda: mllm.load(run)):
        with pytest.raises(MLLMError, match=rf"{tensors} does not have the checksum"):
            read()
    assert any("does not have the checksum" in line for line in problems(recipe, [f"stages.0.init.from={run}"]))


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Path, Path]:
    return Path(tiny_encoder(tmp_path / "encoder")), Path(tiny_lm(tmp_path / "lm"))


@pytest.fixture
def recipe(tmp_path: Path, parts: tuple[Path, Path]) -> str:
    tiny_image(1).save(tmp_path / "1.png")
    (tmp_path / "train.json").write_text(json.dumps([{"image": "1.png", "caption": "one"}]))
    (tmp_path / "recipe.yaml").write_text(f"""
name: damaged
encoder: {{model: {parts[0]}}}
lm: {{model: {parts[1]}}}
connector: {{type: linear}}
data: {{train: {{format: table, path: {tmp_path}/train.json}}}}
stages:
  - {{name: one, train: {{connector: 0.01}}, steps: 4, batch_size: 2, checkpoint_every: 2}}
  - {{name: two, train: {{connector: 0.01}}, steps: 4, batch_size: 2, checkpoint_every: 2}}
""")
    return str(tmp_path / "recipe.yaml")


@pytest.fixture
def interrupted(recipe: str, tmp_path: Path) -> Callable[[int], Path]:
    """Return a function that trains until so many checkpoints are written."""

    def train(checkpoints: int) -> Path:
        with killed_after(checkpoints):
            mllm.train(recipe, out=tmp_path / "run")
            pytest.fail("it was not killed")
        return tmp_path / "run"

    return train


def edited(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


CHANGES: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "weights of the language model": (lambda encoder, lm: tiny_lm(lm, seed=9), "another lm: its fingerprint is"),
    "weights of the encoder": (lambda encoder, lm: tiny_encoder(encoder, seed=9), "another encoder: its fingerprint"),
    "activation": (lambda encoder, lm: edited(lm / "config.json", hidden_act="gelu"), "another lm: its configuration"),
    "mean of the pixels": (
        lambda encoder, lm: edited(encoder / "preprocessor_config.json", image_mean=[0.1, 0.1, 0.1]),
        "another encoder: its preprocessing",
    ),
}


@pytest.mark.parametrize("checkpoints", [1, 2])  # within a stage, and between two
@pytest.mark.parametrize("change", list(CHANGES))
def test_a_run_is_not_resumed_on_other_frozen_parts(change, checkpoints, recipe, parts, interrupted, tmp_path):
    run = interrupted(checkpoints)
    kept = [shutil.copytree(part, tmp_path / f"kept-{part.name}") for part in parts]
    alter, expected = CHANGES[change]
    alter(*parts)
    for accept in (False, True):
        with pytest.raises(MLLMError, match=rf"{run} was trained on {expected}.*Restore the original.*start a new run"):
            mllm.train(recipe, resume=run, accept_changes=accept)
    assert not (run / "frozen.json").exists()
    for copy, part in zip(kept, parts, strict=True):
        shutil.rmtree(part)
        shutil.copytree(copy, part)
    assert mllm.train(recipe, resume=run).path == run
    assert json.loads((run / "frozen.json").read_text()).keys() == {"one", "two"}


def test_parts_that_changed_while_they_were_trained_on_are_those_that_were_loaded(recipe, parts, tmp_path, monkeypatch):
    write = Checkpoints.write

    def replaced(*arguments: Any) -> None:
        write(*arguments)
        tiny_encoder(parts[0], seed=9)

    monkeypatch.setattr(Checkpoints, "write", replaced)
    before = mllm.assemble(str(parts[0]), str(parts[1])).encoder.fingerprint
    run = mllm.train(recipe, out=tmp_path / "run")
    saved = json.loads((run.path / "model" / "assembly.json").read_text())
    assert saved["fingerprints"]["encoder"] == before
    with pytest.raises(MLLMError, match="trained on another encoder"):
        mllm.load(run.path)
