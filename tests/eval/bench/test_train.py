"""Both sides of `bench train` compute the same, each run in its own process."""

from __future__ import annotations

import json
from importlib import import_module

import pytest
import torch

from mllm.errors import MLLMError
from mllm.testing import tiny_lm

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = {**TINY, "image_size": 64}


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return tiny_lm(tmp_path_factory.mktemp("bench-lm"), context=512)


@pytest.fixture
def train():
    return import_module("mllm.eval.bench.train")


def test_both_sides_of_the_llava_shape_are_timed(train, lm, tmp_path):
    lines: list[str] = []
    rows = train.llava(tmp_path, repeats=1, steps=1, progress=lines.append, size=SMALL, lm=lm)
    assert "both have a loss of" in lines[0]
    assert [row.unit for row in rows] == ["images/s", "images/s", "MB"]
    assert all(row.ours > 0 and row.alternative > 0 and row.ratio > 0 for row in rows)
    assert rows[0].bound > rows[1].bound > 1
    log = [json.loads(line) for line in (tmp_path / "ours-0" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2]


def test_sides_that_differ_are_not_timed(train, lm, tmp_path):
    setups, shapes = (import_module(f"mllm.eval.bench.{name}") for name in ("setups", "shapes"))
    vision = shapes.save_vision(tmp_path / "encoder", SMALL)
    made, ours = train._llava_setup(tmp_path, vision, lm, 1)
    stock = shapes.llava_class(ours, tmp_path / "encoder", lm)
    setups.agree(made, ours, stock)
    with torch.no_grad():
        stock.model.multi_modal_projector.linear_2.bias.add_(1.0)
    with pytest.raises(MLLMError, match="so their times cannot be compared"):
        setups.agree(made, ours, stock)


def test_the_hand_written_module_of_the_other_shapes_agrees(train, lm, tmp_path):
    setups, shapes = (import_module(f"mllm.eval.bench.{name}") for name in ("setups", "shapes"))
    vision = shapes.save_vision(tmp_path / "encoder", SMALL)
    annotations = setups.captions(tmp_path / "data", shapes.noise_images(8))
    recipe = train._recipe(vision, lm, {"type": "linear", "tokens": 4}, annotations, 1)
    lines: list[str] = []
    train._joined_setup(tmp_path, recipe, vision, lm, cells=2, steps=1, progress=lines.append)
    assert "both have a loss of" in lines[0]


def test_the_share_of_the_peak(lm, tmp_path):
    share = import_module("mllm.eval.bench.share")
    rows = share.share(tmp_path, repeats=1, steps=1, progress=print, size=SMALL, lm=lm, side=64)
    assert [row.wanted for row in rows] == [0.75, 0.55] and all(row.ratio > 0 for row in rows)


def test_an_unknown_part_is_named(train):
    with pytest.raises(MLLMError, match="'lava'"):
        train.run(only="lava")
