"""Suites that draw and decide: images on disk, baselines that need no model, a judge of generated images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import f1_score

import mllm
from mllm.data.emoji.image import kinds
from mllm.data.emoji.scenes import emoji_scenes, indexed
from mllm.data.readers.decisions import decisions
from mllm.errors import MLLMError
from mllm.testing import tiny_image

TOKENS = ["[IMG0]", "[IMG1]"]
HEADS: list[dict[str, Any]] = [
    {"type": "generation", "tokens": 2, "length": 1, "width": 32, "dim": 16, "layers": 1, "heads": 2},
    {"type": "decision"},
]
CAPTIONS = ["a red wall", "a cat", "two dogs"]


@pytest.fixture
def model(tiny_model, tiny_decoder):
    return tiny_model(heads=HEADS, tokens=TOKENS, decoder={"type": "trained", "model": tiny_decoder})


@pytest.fixture
def suites(tmp_path, tiny_clip):
    rows = [{"image": f"{number}.png", "caption": text} for number, text in enumerate(CAPTIONS)]
    for row in rows:
        tiny_image(len(row["caption"])).save(tmp_path / row["image"])
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    labels = zip(CAPTIONS, ("retrieve", "generate", "generate"), strict=True)
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps({"prompt": p, "label": x}) + "\n" for p, x in labels))
    draw = {"data": {"format": "table", "path": str(tmp_path / "captions.json")}, "answer": "draw"}
    draw |= {"metrics": ["generation/clip-similarity"], "scorer": {"type": "dual-encoder", "model": tiny_clip}}
    decide = {"data": {"format": "decisions", "path": str(tmp_path / "labels.jsonl")}, "answer": "decide"}
    for name, suite in {"draw": draw, "decide": {**decide, "metrics": ["decision/f1"]}}.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"name": name, "about": "tiny", "batch_size": 2, **suite}))
    return tmp_path


def test_a_suite_that_draws_generates_each_items_image_and_compares_it_with_others(model, suites, tmp_path):
    report = mllm.evaluate(model, str(suites / "draw.yaml"), out=tmp_path / "out")
    paths = [row["prediction"] for row in report.rows]
    for text, path in zip(CAPTIONS, paths, strict=True):
        (part,) = model.draw([[f"A picture of {text}"]])
        assert np.abs(np.asarray(part.image, int) - np.asarray(Image.open(path))).max() <= 1
    shuffled = [row["baselines"]["shuffled"] for row in report.rows]
    assert sorted(shuffled) == sorted(paths) and all(a != b for a, b in zip(shuffled, paths, strict=True))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    (entry,) = summary["metrics"]
    assert entry["name"] == "generation/clip-similarity" and -1 <= entry["value"] <= 1
    with pytest.raises(MLLMError, match="no folder to save them in: give out=FOLDER"):
        mllm.evaluate(model, str(suites / "draw.yaml"))
    with pytest.raises(MLLMError, match="has the baselines shuffled, and no 'blind'"):
        mllm.evaluate(model, str(suites / "draw.yaml"), out=tmp_path / "other", baselines=["blind"])


def test_a_suite_that_decides_is_compared_with_constant_labels(model, suites, tiny_model):
    with torch.no_grad():
        model.heads["decision"].judge.weight.zero_()
        model.heads["decision"].judge.bias.copy_(torch.tensor([0.0, 1.0]))
    report = mllm.evaluate(model, str(suites / "decide.yaml"))
    assert [row["prediction"] for row in report.rows] == ["generate"] * 3
    (entry,) = report.summary["metrics"]
    true = ["retrieve", "generate", "generate"]
    expected = {name: f1_score(true, [name] * 3, average="macro", zero_division=0) for name in ("retrieve", "generate")}
    assert {name: other["value"] for name, other in entry["baselines"].items()} == pytest.approx(expected)
    assert entry["value"] == pytest.approx(expected["generate"])
    with pytest.raises(MLLMError, match="needs a decision head"):
        mllm.evaluate(tiny_model(), str(suites / "decide.yaml"))


def test_f1_is_sklearns():
    draw = np.random.default_rng(0)
    true, predicted = (draw.choice(["retrieve", "generate"], 50).tolist() for _ in range(2))
    score = mllm.metric("decision/f1")(predicted, [[label] for label in true])
    assert score.value == pytest.approx(f1_score(true, predicted, average="macro"))


def test_labels_are_read_and_wrong_ones_named(tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_text('{"prompt": "a cat", "label": "retrieve"}\n{"prompt": "a dog", "label": "both"}\n')
    with pytest.raises(MLLMError, match="line 2: the label is 'both'"):
        decisions(path=str(path))


@pytest.mark.installed
def test_still_scenes_have_what_their_captions_say(need):
    need("mllm/openmoji")
    items = emoji_scenes(split="train", task="draw", size=40, still=True)
    for item, source in zip(items, emoji_scenes(split="train", task="source", size=40, still=True), strict=True):
        (thing,) = item.images[0].things  # type: ignore[attr-defined]
        assert (thing.x, thing.y, thing.angle) == (112, 112, 0)
        assert item.question == source.question and item.question is not None
        assert item.question.startswith(f"{item.answers[0]} on ") and thing.kind.name in item.answers[0]
        assert not source.images and source.answers == ("retrieve" if indexed(thing.kind) else "generate",)
    assert 0.4 < np.mean([indexed(kind) for kind in kinds()]) < 0.6
    with pytest.raises(MLLMError, match="no still scenes of several objects"):
        emoji_scenes(split="train", task="objects", still=True)


@pytest.mark.installed
def test_the_judge_recognizes_the_object_in_an_image(need, monkeypatch, tmp_path):
    need("mllm/openmoji", "mllm/efficientnet-lite0")
    monkeypatch.setattr("mllm.eval.metrics.judged._SCENES", 24)
    monkeypatch.setattr(
        "mllm.eval.metrics.judged.open_store", lambda model, _: mllm.encoders.feature_store.FeatureStore(model)
    )
    items = emoji_scenes(split="train", task="name", size=6, seed=11, still=True)
    for number, item in enumerate(items):
        item.images[0].open().save(tmp_path / f"{number}.png")
    paths, right = [str(tmp_path / f"{number}.png") for number in range(6)], [list(item.answers) for item in items]
    judge = mllm.metric("generation/emoji")
    assert judge(paths, right).per_item == [1.0] * 6
    assert judge(paths[::-1], right).value == 0.0
    assert (judge(paths[:1], right[:1]).name, Path(paths[0]).suffix) == ("generation/emoji", ".png")
    with pytest.raises(MLLMError, match="The judge knows no 'a unicorn farm'"):
        judge(paths[:1], [["a unicorn farm"]])
