"""What `mllm data check` finds, and what it counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mllm
from mllm.cli import app
from mllm.data.inspection import inspect
from mllm.errors import MLLMError
from mllm.testing import tiny_image


@pytest.fixture
def recipe(tmp_path: Path, tiny_parts: tuple[str, str]) -> Path:
    """A recipe on two tables: four pictures that are trained on, one of which is validated on under another name."""
    for index in range(4):
        tiny_image(index).save(tmp_path / f"{index}.png")
    tiny_image(9).save(tmp_path / "new.png")
    (tmp_path / "twin.png").write_bytes((tmp_path / "2.png").read_bytes())
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
    assert [(s.name, s.items, s.answers, s.pictures) for s in found] == [
        ("align: train 1, table", 5, 9, 4),
        ("align: val 1, table", 1, 1, 1),
    ]
    model = mllm.assemble(*tiny_parts, {"type": "linear", "tokens": 4})
    prompt = model.spec.prompt
    texts = [prompt.caption + " a dog", prompt.caption + " two cats on a mat", "Question: what? Answer: a dog"]
    lengths = sorted([len(model.lm.tokenize(text)) + 4 + 1 for text in texts])  # four visual tokens, and the end
    assert found[0].lengths is not None
    assert (found[0].lengths[0], found[0].lengths[-1]) == (lengths[0], lengths[-1])
    assert not shared and not any(source.problems for source in found)
    done = CliRunner().invoke(app, ["data", "check", str(recipe)])
    assert done.exit_code == 0 and "nothing found against its data" in done.output


def test_what_is_wrong_is_listed(recipe: Path) -> None:
    folder = recipe.parent
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:100])
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    rows[3]["caption"] = ["see <image>", "word " * 80]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "val.jsonl").write_text(json.dumps({"image": "twin.png", "caption": "a bus"}))
    found, shared = inspect(str(recipe))
    assert [problem.removeprefix("align: train 1, table: ")[:40] for problem in found[0].problems] == [
        f"1 pictures cannot be read: {folder}/1.png"[:40],
        "1 items hold the text '<image>', which i",
        "1 items do not fit into the language mod",
    ]
    assert shared == ["align: val 1, table: 1 of 1 pictures are trained on, too."]
    done = CliRunner().invoke(app, ["data", "check", str(recipe)])
    assert isinstance(done.exception, MLLMError) and "4 problems in the data" in str(done.exception)
    assert "1.png" in done.output.replace("\n", "")
