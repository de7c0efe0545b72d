"""Features that are made before training: all of them, by several processes, and after an interruption."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mllm
from mllm.build import build
from mllm.config.loading import load
from mllm.encoders.feature_folder import features_folder
from mllm.encoders.feature_store import FeatureStore, open_store
from mllm.errors import MLLMError
from mllm.media.images import ImageFile
from mllm.testing import tiny_image
from mllm.training.features import make_features
from mllm.training.signals import Interrupted
from tests.fuzz.folders import killed_after

COUNT = 9


@pytest.fixture
def recipe(tiny_parts, tmp_path) -> str:
    """Images for training, one of them twice, and one more for validation."""
    for number in range(COUNT):
        tiny_image(number).save(tmp_path / f"{number}.png")
    rows = [{"image": f"{number % (COUNT - 1)}.png", "caption": "red"} for number in range(COUNT)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    (tmp_path / "val.json").write_text(json.dumps([{"image": f"{COUNT - 1}.png", "caption": "blue"}]))
    (tmp_path / "recipe.yaml").write_text(f"""
name: features
encoder: {{model: {tiny_parts[0]}}}
lm: {{model: {tiny_parts[1]}}}
connector: {{type: linear, tokens: 4}}
data:
  train: {{format: table, path: {tmp_path}/train.json}}
  val: {{format: table, path: {tmp_path}/val.json}}
stages:
  - {{name: align, train: [connector], steps: 4, batch_size: 3, validate_every: 2, checkpoint_every: 2}}
  - {{name: tune, train: [connector], steps: 2, batch_size: 3}}
""")
    return str(tmp_path / "recipe.yaml")


@pytest.fixture
def model(recipe) -> Any:
    return build(load(recipe).stages[0].assembly)


def stored(model: Any, dtype: str = "auto") -> dict[str, torch.Tensor]:
    shards = [load_file(path) for path in features_folder(model, dtype).glob("*.safetensors")]
    rows = {key: row for shard in shards for key, row in shard.items()}
    assert len(rows) == sum(map(len, shards))  # none twice
    return rows


def images(recipe: str) -> dict[str, ImageFile]:
    files = [ImageFile(path) for path in sorted(Path(recipe).parent.glob("*.png"))]
    return {file.key(): file for file in files}


def test_all_images_of_a_recipe_are_encoded_once(recipe, model):
    first, second = make_features(recipe), make_features(recipe)
    assert [(each.computed, each.present) for each in first] == [(COUNT, 0), (0, 0)]
    assert [(each.computed, each.present) for each in second] == [(0, COUNT), (0, 0)]
    assert "stage before" in str(first[1])
    expected = images(recipe)
    rows = stored(model)
    assert rows.keys() == expected.keys()
    for key, row in rows.items():
        torch.testing.assert_close(row, model.features([expected[key]])[0])


def test_training_reads_them_and_computes_none(recipe, monkeypatch):
    make_features(recipe)
    monkeypatch.setattr(mllm.assembly.Assembly, "encoded", None)
    mllm.train(recipe, out=Path(recipe).parent / "run")


@pytest.mark.timeout(120)
def test_two_processes_take_half_of_the_images_each(recipe, model, start):
    written = start("features", recipe, "cache.dtype=bfloat16", count=2).finish()
    assert written.count(f"{COUNT} images computed, of 0 there") == 1
    assert stored(model, "bfloat16").keys() == images(recipe).keys()
    assert len(list(features_folder(model, "bfloat16").iterdir())) == 2
    assert make_features(recipe, ["cache.dtype=bfloat16"])[0].present == COUNT


def test_an_interrupted_pass_is_continued(recipe, model, monkeypatch):
    monkeypatch.setattr("mllm.training.features.BATCH", 2)
    encode = FeatureStore.__call__

    def interrupted(store: FeatureStore, shown: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return encode(store, shown)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureStore, "__call__", interrupted)
        with pytest.raises(Interrupted, match=r"Ctrl-C after 2 images.*Continue with: mllm features it a=b"):
            make_features(recipe, command=["mllm", "features", "it", "a=b"])
    assert len(stored(model)) == 2
    rest = make_features(recipe)[0]
    assert (rest.computed, rest.present) == (COUNT - 2, 2)
    assert stored(model).keys() == images(recipe).keys()


def test_unreadable_images_are_skipped_as_the_recipe_allows(recipe, model):
    (Path(recipe).parent / "3.png").write_bytes(b"no image")
    result = make_features(recipe, ["data.skip=0.3"])[0]
    assert (result.computed, result.skipped) == (COUNT - 1, 1) and "1 could not be read" in str(result)
    whole = {file.path.name: key for key, file in images(recipe).items()}
    assert stored(model).keys() == {key for name, key in whole.items() if name != "3.png"}
    with pytest.raises(MLLMError, match=r"3\.png.*|data\.skip"):
        make_features(recipe, ["data.skip=0"])


def test_a_pass_ends_at_the_limit(recipe, model):
    limit = 12_000
    result = make_features(recipe, [f"cache.limit={limit}"])[0]
    assert result.full and "cache.limit" in str(result)
    assert sum(path.stat().st_size for path in features_folder(model).iterdir()) <= limit
    assert 0 < len(stored(model)) < COUNT


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"stages.0.train": {"encoder": 1e-4, "connector": 1e-4}}, ["the encoder trains", "trained by a stage before"]),
        ({"cache": "off"}, ["cache is off", "cache is off"]),
        ({"data.augment": {"flip": 0.5}}, ["data.augment", "data.augment"]),
    ],
)
def test_a_stage_whose_features_change_has_none_to_compute(recipe, model, overrides, reason):
    lines = list(map(str, make_features(recipe, overrides)))
    assert all(each in line for each, line in zip(reason, lines, strict=True)), lines
    assert not features_folder(model).exists()


def test_a_fit_reads_images_as_a_whole(recipe, model):
    tiles = {"kind": "anyres", "grids": [[2, 2]], "unpad": False}
    stages = [
        {"name": "fit", "fit": {"targets": "caption-words"}},
        {"name": "align", "train": ["connector"], "steps": 1},
    ]
    overrides = {"encoder.tiles": tiles, "stages": stages}
    fit, align = make_features(recipe, overrides)
    assert (fit.computed, align.computed) == (COUNT - 1, COUNT)
    tiled = build(load(recipe, overrides).stages[0].assembly)
    rows = stored(tiled)
    assert {key.rpartition("/")[0] for key in rows} == {"", "whole"} and len(rows) == 2 * COUNT - 1


# Rounded features.


def test_rounded_features_are_the_same_fresh_and_cached(recipe, model, monkeypatch):
    shown = [tiny_image(number) for number in range(5)]
    exact = open_store(model, "off")(shown)
    setting = load(recipe, ["cache.dtype=bfloat16"]).cache
    store = open_store(model, setting)
    fresh = store(shown)
    assert fresh.dtype == exact.dtype and torch.equal(fresh, exact.bfloat16().float()) and not torch.equal(fresh, exact)
    store.flush()
    assert {row.dtype for row in stored(model, "bfloat16").values()} == {torch.bfloat16}
    assert torch.equal(FeatureStore(model, limit=0, dtype=torch.bfloat16)(shown), fresh)  # beyond the limit, too
    monkeypatch.setattr(model, "encoded", None)
    for cached in (store(shown), open_store(model, setting)(shown)):
        assert torch.equal(cached, fresh)
    assert not features_folder(model).exists()


def test_a_run_on_rounded_features_is_resumed_bit_for_bit(recipe, tmp_path, monkeypatch):
    rounded = ["cache.dtype=bfloat16"]
    with killed_after(1):
        mllm.train(recipe, rounded, out=tmp_path / "killed")
    run = mllm.train(recipe, rounded, resume=tmp_path / "killed")
    monkeypatch.setenv("MLLM_CACHE", str(tmp_path / "another"))
    whole = mllm.train(recipe, rounded, out=tmp_path / "whole")
    assert (run.path / "log.jsonl").read_bytes() == (whole.path / "log.jsonl").read_bytes()
