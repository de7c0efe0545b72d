"""What `mllm data check` finds, and what it counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mllm
from mllm.cli.app import app
from mllm.errors import MLLMError
from mllm.planning.data_check import inspect
from mllm.testing import tiny_image


@pytest.fixture
def recipe(tmp_path: Path, tiny_parts: tuple[str, str]) -> Path:
    """A recipe on two tables: four pictures that are trained on, one of which is validated on under another name."""
    for index in range(4):
        tiny_image(index).save(tmp_path / f"{index}.png")
    tiny_image(9).save(tmp_path / "new.png")
    tiny_image(2).save(tmp_path / "twin.bmp")  # other bytes, the same pixels
    rows = [{"image": f"{index}.png", "caption": ["a dog", "two cats on a mat"]} for index in range(4)]
    rows.append({"image": "0.png", "question": "what?", "answer": "a dog"})
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "val.jsonl").write_text(json.dumps({"image": "new.png", "caption": "a bus"}))
    text = f"""name: tiny
encoder: {{model: {tiny_parts[0]}}}
lm: {{model: {tiny_parts[1]}}}
connector: {{type: linear, tokens: 4}}
data:
  train: {{format: table, path: {tmp_path}/train.jsonl}}
  val: {{format: table, path: {tmp_path}/val.jsonl}}
stages:
  - {{name: align, train: [connector], steps: 2, batch_size: 2}}
  - {{name: tune, train: [connector], steps: 2, batch_size: 2}}
"""
    (tmp_path / "tiny.yaml").write_text(text)
    return tmp_path / "tiny.yaml"


def test_sources_are_counted_once_for_all_stages(recipe: Path, tiny_parts: tuple[str, str]) -> None:
    found, shared = inspect(str(recipe))
    assert [(s.name, s.items, s.answers, s.images) for s in found] == [
        ("align: train 1, table", 5, 9, 4),
        ("align: val 1, table", 1, 1, 1),
    ]
    model = mllm.assemble(*tiny_parts, {"type": "linear", "tokens": 4})
    prompt = model.spec.prompt
    texts = [prompt.caption + " a dog", prompt.caption + " two cats on a mat", "Question: what? Answer: a dog"]
    lengths = sorted([len(model.lm.tokenize(text)) + 4 + 1 for text in texts])  # four visual tokens, and the end
    assert {*found[0].lengths} == {*lengths} and len(found[0].lengths) == 9
    bins = found[0].histogram()
    assert sum(count for _, _, count in bins) == 9 and bins[0][0] == lengths[0] and bins[-1][0] <= lengths[-1]
    assert not shared and not any(source.problems for source in found)
    done = CliRunner().invoke(app, ["data", "check", str(recipe)])
    assert done.exit_code == 0 and "nothing found against its data" in done.output


def test_what_is_wrong_is_listed(recipe: Path) -> None:
    folder = recipe.parent
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:100])
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    rows[3]["caption"] = ["see <image>", "word " * 80]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "val.jsonl").write_text(json.dumps({"image": "twin.bmp", "caption": "a bus"}))
    found, shared = inspect(str(recipe))
    assert [problem.removeprefix("align: train 1, table: ")[:40] for problem in found[0].problems] == [
        f"1 images cannot be read: {folder}/1.png"[:40],
        "1 items contain the text '<image>', whic",
        "1 items do not fit into the language mod",
    ]
    assert shared == ["align: val 1, table: 1 of 1 images are trained on, too."]
    done = CliRunner().invoke(app, ["data", "check", str(recipe)])
    assert isinstance(done.exception, MLLMError) and "4 problems in the data" in str(done.exception)
    assert "1.png" in done.output.replace("\n", "")


def test_what_examples_together_take_and_what_is_too_long(recipe: Path) -> None:
    alone, _ = inspect(str(recipe))
    text = recipe.read_text().replace("train.jsonl}", "train.jsonl, shots: 2}", 1)
    recipe.write_text(text)
    found, _ = inspect(str(recipe))
    assert len(found[0].lengths) == 5 and min(found[0].lengths) > 2 * min(alone[0].lengths)
    recipe.write_text(text.replace(", shots: 2", "").replace("data:", "data:\n  max_length: 30", 1))
    for truncate, what in (("drop", "are left out"), ("text", "lose text")):
        (problem,) = inspect(str(recipe), {"data.truncate": truncate})[0][0].problems
        assert f"5 items {what}: they are longer than data.max_length, 30 tokens" in problem


def test_pictures_of_a_suite_that_are_trained_on(recipe: Path, tmp_path: Path) -> None:
    place = tmp_path / "suite"
    (place / "images").mkdir(parents=True)
    for number, seed in enumerate((2, 50)):
        tiny_image(seed).save(place / "images" / f"{number}.png")
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(2)]
    captions = [{"image_id": number, "caption": "x"} for number in range(2)]
    (place / "captions_val.json").write_text(json.dumps({"images": images, "annotations": captions}))
    recipe.write_text(recipe.read_text() + "eval: {suites: [coco-captions]}\n")
    _, shared = inspect(str(recipe), data=place)
    assert shared == ["suite coco-captions: 1 of 2 images are trained on, too."]
    done = CliRunner().invoke(app, ["data", "check", str(recipe), "--data", str(place)])
    assert "1 problem in the data" in str(done.exception)
    with pytest.raises(MLLMError, match="needs --data DIR"):
        inspect(str(recipe))
