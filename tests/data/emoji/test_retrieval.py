"""Test retrieval of scenes: their contents are distinct, and longer queries match fewer scenes."""

from __future__ import annotations

import re

import pytest
import torch
from typer.testing import CliRunner

import mllm
from mllm.cli.app import app
from mllm.data.emoji.retrieval import emoji_retrieval
from mllm.errors import MLLMError
from mllm.registry import lookup


def test_each_scene_has_a_distinct_caption():
    items = emoji_retrieval(size=40)
    images, texts = items[:40], items[40:]
    assert {item.kind for item in images} == {"text to image"} and {item.kind for item in texts} == {"image to text"}
    assert len({item.question for item in images}) == 40 and len(set(images[0].images)) == 40
    for index, (to_image, to_text) in enumerate(zip(images, texts, strict=True)):
        assert to_image.answers == to_text.answers == (str(index),)
        assert to_text.choices[index] == to_image.question and to_text.images == (to_image.images[index],)


def test_longer_queries_match_fewer_scenes(monkeypatch):
    items = emoji_retrieval(find="images", told=["object", "objects", "scene"], size=30)
    one, every, scene = items[:30], items[30:60], items[60:]
    assert {item.kind for item in one} == {"text to image, object told"}
    for least, more, most in zip(one, every, scene, strict=True):
        assert least.answers == more.answers == most.answers
        few, many, whole = (str(item.question) for item in (least, more, most))
        assert few in many and whole.startswith(many) and whole.endswith("background") and "background" not in many
    with pytest.raises(MLLMError, match="does not support 'all'"):
        lookup("readers", "emoji-retrieval")(told=["all"])
    monkeypatch.setattr("mllm.data.emoji.retrieval.OVERSAMPLING", 1)
    with pytest.raises(MLLMError, match="size is 100"):
        emoji_retrieval(split="kinds", size=100)


def test_the_suite_runs(tiny_model, tmp_path):
    model = tiny_model(heads=[{"type": "retrieval", "dim": 6}], tokens=["[RET]"])
    torch.manual_seed(0)
    report = mllm.evaluate(model, "emoji-retrieval", overrides=["data.size=6"], out=tmp_path)
    assert report.summary["n"] == 12 and report.summary["baselines"] == ["shuffled"]
    assert set(report.summary["kinds"]) == {"text to image", "image to text"}
    assert report["retrieval/r@10"]["value"] == 1 and report["retrieval/median-rank"]["better"] == "lower"
    assert all(sorted(row["prediction"].split()) == [*"012345"] for row in report.rows)
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_the_command_prints_each_kind(tiny_model, tmp_path):
    tiny_model(heads=[{"type": "retrieval", "dim": 6}], tokens=["[RET]"]).save(tmp_path / "run")
    command = ["eval", str(tmp_path / "run"), "data.size=6", "--suite", "emoji-context"]
    output = CliRunner().invoke(app, command, catch_exceptions=False).output
    for content in ("object", "objects", "scene"):
        assert re.search(rf"text to image, {content} told: retrieval/r@1 \d\.\d{{3}}, 6 items", output)
