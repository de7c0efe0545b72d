"""The baseline ``nearest``: the answer of the training image that is most similar by the encoder's own features."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mllm
from mllm.errors import MLLMError
from mllm.testing import tiny_image

NAMES = ["a cat", "a dog", "a bird", "a fish"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with captions and questions about four images, and a suite of almost the same images."""
    folder = tmp_path_factory.mktemp("nearest")
    for index in range(4):
        image = tiny_image(index)
        image.save(folder / f"train{index}.png")
        image.putpixel((0, 0), (1, 2, 3))
        image.save(folder / f"test{index}.png")
    captions = [{"image": f"train{i}.png", "caption": [f"{name}.", "an animal."]} for i, name in enumerate(NAMES)]
    asked = [
        {"image": f"train{i}.png", "question": question, "answer": [f"{answer} {i}"]}
        for i in (0, 1)
        for question, answer in (("What colour?", "red"), ("How many?", "one"))
    ]
    tests = [{"image": f"test{i}.png", "caption": [name]} for i, name in reversed(list(enumerate(NAMES)))]
    questions = [
        {"image": f"test{i}.png", "question": question, "answer": ["?"]}
        for i, question in ((1, "How many?"), (0, "What colour?"), (3, "Where?"))
    ]
    files = {"captions": captions, "asked": asked, "tests": tests, "questions": questions}
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    for name in ("tests", "questions"):
        source = f"{{format: table, path: {folder}/{name}.json}}"
        (folder / f"{name}.yaml").write_text(
            f"{{name: {name}, about: almost the same images, data: {source}, metrics: [vqa/exact-match]}}"
        )
    return folder


@pytest.fixture(scope="module")
def run(data: Path, tiny_parts: tuple[str, str]) -> Path:
    """A run that was trained on the folder's captions and questions."""
    recipe = data / "recipe.yaml"
    recipe.write_text(f"""
name: nearest
encoder: {{model: {tiny_parts[0]}}}
lm: {{model: {tiny_parts[1]}}}
connector: {{type: linear, tokens: 4}}
data:
  train:
    - {{format: table, path: {data}/captions.json}}
    - {{format: table, path: {data}/asked.json}}
stages: [{{name: one, train: {{connector: 0.01}}, steps: 1, batch_size: 4}}]
""")
    return mllm.train(str(recipe), out=data / "run").path


def answers(report: Any) -> dict[str, str]:
    return {row["id"]: row["baselines"]["nearest"] for row in report.rows}


def test_the_caption_is_that_of_almost_the_same_training_image(data, run):
    report = mllm.evaluate(mllm.load(run), str(data / "tests.yaml"))
    assert report.summary["baselines"] == ["blind", "shuffled", "nearest"]
    assert list(answers(report).values()) == [f"{name}." for name in reversed(NAMES)]
    assert report["vqa/exact-match"]["baselines"]["nearest"]["value"] == 1.0


def test_a_question_has_the_answer_to_the_same_question(data, run):
    model = mllm.load(run)
    report = mllm.evaluate(model, str(data / "questions.yaml"))
    how_many, colour, where = answers(report).values()
    assert (how_many, colour) == ("one 1", "red 0")

    def vector(name: str) -> Any:
        mean = np.asarray(model.features([data / name]).float().mean(dim=1)[0])
        return mean / np.linalg.norm(mean)

    nearest = max((0, 1), key=lambda i: float(vector("test3.png") @ vector(f"train{i}.png")))
    assert where == f"red {nearest}"  # nobody asked "Where?" in training: the first of that image's answers


def test_the_items_own_image_is_not_the_nearest(data, run):
    report = mllm.evaluate(mllm.load(run), str(data / "tests.yaml"), overrides=[f"data.path={data}/captions.json"])
    assert all(answer != f"{name}." for answer, name in zip(answers(report).values(), NAMES, strict=True))


def test_a_model_without_its_training_data_is_evaluated_without_it(data, run, tiny_parts, tmp_path):
    model = mllm.assemble(tiny_parts[0], tiny_parts[1], {"type": "linear", "tokens": 4})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mllm.evaluate(model, str(data / "tests.yaml")).summary["baselines"] == ["blind", "shuffled"]
    with pytest.raises(MLLMError, match="'nearest' is not available: it needs a run that was trained on captions"):
        mllm.evaluate(model, str(data / "tests.yaml"), baselines=["nearest"])
    shutil.copytree(run, tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(data), "/nowhere"))
    with pytest.warns(UserWarning, match="without the baseline 'nearest'.*nowhere"):
        report = mllm.evaluate(mllm.load(tmp_path / "run"), str(data / "tests.yaml"), baselines=None)
    assert report.summary["baselines"] == ["blind", "shuffled"]
