"""Predictions that already exist: scored from files of any system, and two evaluations compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import mllm
from mllm.cli.app import app
from mllm.errors import MLLMError
from mllm.evaluation import compare, score
from mllm.testing import tiny_image


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Five images, two captions each."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for index in range(5):
        tiny_image(index).save(folder / "images" / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png"})
        annotations += [{"image_id": index, "caption": f"{word} {index} of them"} for word in ("a dog", "the cat")]
    (folder / "captions_val.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder


ROWS = [{"image_id": index, "caption": f"a dog {index} of them"} for index in (3, 1, 0, 4, 2)]


def written(folder: Path, content: Any, name: str = "answers.json") -> Path:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / name


def test_an_official_result_file_is_scored_whatever_its_order(data: Path, tmp_path: Path) -> None:
    report = score(written(tmp_path, ROWS), "coco-captions", data, out=tmp_path / "out")
    predictions = [f"a dog {index} of them" for index in range(5)]
    references = [[f"a dog {index} of them", f"the cat {index} of them"] for index in range(5)]
    for name in ("caption/cider-d", "caption/bleu-4", "caption/rouge-l"):
        assert report[name]["value"] == mllm.metric(name)(predictions, references).value
        low, value, high = (report[name][key] for key in ("low", "value", "high"))
        assert low - 1e-6 <= value <= high + 1e-6
    assert [row["id"] for row in report.rows] == ["0", "1", "2", "3", "4"]
    again = score(tmp_path / "out/predictions.jsonl", "coco-captions", data)
    assert again.rows == report.rows
    submitted = json.loads((tmp_path / "out/submission.json").read_text())
    assert submitted == sorted(ROWS, key=lambda row: int(row["image_id"]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ROWS[:4], r"1 of the suite's 5 items have no prediction: 2\. A part of the items is not scored as the whole"),
        ([*ROWS, {"image_id": 9, "caption": "x"}], r"1 ids are not in the suite coco-captions: 9\."),
        ([*ROWS, ROWS[1]], r"row 6: item '1' is there twice"),
        ([*ROWS[:4], {"image_id": 2, "caption": float("nan")}], r"row 5: the prediction of item '2' is NaN"),
        ([*ROWS[:4], {"image_id": 2, "caption": None}], r"row 5: the prediction of item '2' is NoneType"),
        ([*ROWS[:4], {"image_id": 2}], r"row 5: expected a prediction under one of the keys caption"),
        ([*ROWS[:4], {"caption": "x"}], r"row 5: expected an id under one of the keys image_id"),
        (json.dumps(ROWS)[:-20], r"answers\.json is not JSON"),
        ({"annotations": ROWS}, "holds a dict"),
    ],
)
def test_what_is_wrong_in_a_result_file_is_named(data: Path, tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(MLLMError, match=message):
        score(written(tmp_path, content), "coco-captions", data, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_half_written_line_is_named(data: Path, tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    with pytest.raises(MLLMError, match=r"answers\.jsonl, line 5 is not JSON"):
        score(written(tmp_path, lines[:-12], "answers.jsonl"), "coco-captions", data)


def test_two_evaluations_are_compared(data: Path, tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    first = score(written(tmp_path, ROWS), "coco-captions", data, out=mine)
    second = mllm.evaluate(tiny_model({"type": "linear", "tokens": 4}), "coco-captions", data, out=theirs, run="tiny")
    report = compare(mine, theirs, data, out=tmp_path / "both")
    entry = report["caption/rouge-l"]
    assert entry["value"] == first["caption/rouge-l"]["value"]
    assert entry["baselines"]["tiny"]["value"] == second["caption/rouge-l"]["value"]
    gains = [
        a["scores"]["caption/rouge-l"] - b["scores"]["caption/rouge-l"]
        for a, b in zip(first.rows, second.rows, strict=True)
    ]
    assert entry["baselines"]["tiny"]["gain"] == pytest.approx(np.mean(gains))
    assert entry["baselines"]["tiny"]["low"] <= np.mean(gains) <= entry["baselines"]["tiny"]["high"]
    assert "data:image/jpeg" in (tmp_path / "both/report.html").read_text()
    bare = compare(mine, theirs)  # without the images
    assert bare.rows == report.rows and bare["caption/rouge-l"] == entry


def test_evaluations_that_cannot_be_compared_are_refused(data: Path, tmp_path: Path) -> None:
    mine, part, other = tmp_path / "mine", tmp_path / "part", tmp_path / "other"
    file = written(tmp_path, ROWS)
    score(file, "coco-captions", data, out=mine)
    score(file, "coco-captions", data, out=part, limit=3)
    score(file, "coco-captions", data, out=other, overrides=["metrics=[caption/bleu-1]"])
    with pytest.raises(MLLMError, match="their items differ"):
        compare(mine, part)
    with pytest.raises(MLLMError, match=r"their metrics differ \(caption/cider-d v1.*and caption/bleu-1 v1\)"):
        compare(mine, other)
    summary = json.loads((mine / "summary.json").read_text())
    summary["metrics"][0]["version"] = "0"
    (mine / "summary.json").write_text(json.dumps(summary))
    score(file, "coco-captions", data, out=tmp_path / "again")
    with pytest.raises(MLLMError, match=r"caption/cider-d v0.* and caption/cider-d v1"):
        compare(mine, tmp_path / "again")
    (mine / "summary.json").write_text('{"suite": "coco')
    with pytest.raises(MLLMError, match=r"summary\.json is not JSON"):
        compare(mine, part)
    with pytest.raises(MLLMError, match=r"summary\.json cannot be read"):
        compare(tmp_path / "none", part)


def test_the_commands(data: Path, tmp_path: Path) -> None:
    file, runner = str(written(tmp_path, ROWS)), CliRunner()
    for name in ("one", "two"):
        line = ["score", file, "--suite", "coco-captions", "--data", str(data), "--out", str(tmp_path / name)]
        done = runner.invoke(app, line)
        assert done.exit_code == 0 and "caption/cider-d" in done.output
    done = runner.invoke(app, ["compare", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "c")])
    assert done.exit_code == 0 and "+0.000" in done.output and (tmp_path / "c/report.html").exists()
