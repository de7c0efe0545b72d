"""Verified recipes: pooling over seeds, the file of results, the table."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mllm.cli.app import app
from mllm.config import loading
from mllm.errors import MLLMError
from mllm.evaluation import metric
from mllm.planning.check import problems
from mllm.testing import tiny_image

verify: Any = import_module("mllm.eval.verify")
results: Any = import_module("mllm.eval.results")


def row(number: int, prediction: str, blind: str) -> dict[str, Any]:
    return {
        "id": str(number),
        "references": [f"thing {number}"],
        "prediction": prediction,
        "baselines": {"blind": blind},
    }


def run(right: set[int], blind: set[int], size: int = 40) -> list[dict[str, Any]]:
    return [row(i, f"thing {i}" if i in right else "no", f"thing {i}" if i in blind else "no") for i in range(size)]


def test_pooled_is_the_mean_over_runs_and_its_interval_contains_the_gain() -> None:
    runs = [run(set(range(20)), {0, 1}), run(set(range(10, 30)), {0, 1})]
    scores = verify.pooled(runs, "vqa/exact-match")
    assert scores["value"] == 0.5
    gain = scores["gains"]["blind"]
    assert (gain["value"], gain["gain"]) == (0.05, 0.45)
    assert 0 < gain["low"] < 0.45 < gain["high"] < 1


def test_more_runs_do_not_count_as_more_items() -> None:
    once = verify.pooled([run({0, 1, 2}, set())], "vqa/exact-match")["gains"]["blind"]
    thrice = verify.pooled([run({0, 1, 2}, set())] * 3, "vqa/exact-match")["gains"]["blind"]
    assert (once["low"], once["high"]) == (thrice["low"], thrice["high"])


def test_baselines_without_a_column_have_a_line(tmp_path: Path) -> None:
    gain = {"value": 0.5, "gain": 0.25, "low": 0.2, "high": 0.3}
    scores = {"decide": {"metric": "m", "value": 0.75, "gains": {"always": gain, "shuffled": gain}}}
    content = {"command": "c", "seeds": [0, 1], "minutes": 2.0, "items": {"decide": 9}, "scores": scores}
    (tmp_path / "r.yaml").write_text(json.dumps(content))
    assert results.conditions(["r", "unknown"], tmp_path) == (
        "- `c`: seeds 0, 1; 9 items per suite; training takes up to 2.0 minutes per seed.\n"
        "    - decide, baseline `always`: 0.500; gain +0.200 to +0.300.\n"
    )


def test_a_score_of_all_items_together_is_not_pooled() -> None:
    rows = [{**row, "prediction": "retrieve", "references": ["generate"]} for row in run(set(), set())]
    with pytest.raises(MLLMError, match="decision/f1 scores all items together, and runs are pooled item by item"):
        verify.pooled([rows], "decision/f1")


def test_other_items_are_not_pooled() -> None:
    with pytest.raises(MLLMError, match="same items"):
        verify.pooled([run(set(), set()), run(set(), set())[::-1]], "vqa/exact-match")


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_parts: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe on tiny parts, and a suite of three images, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        tiny_image().save(tmp_path / f"{name}.png")
    (tmp_path / "train.csv").write_text("image,caption\n" + "".join(f"{name}.png,noise {name}\n" for name in "abc"))
    text = f"""
name: small
encoder: {{model: {tiny_parts[0]}}}
lm: {{model: {tiny_parts[1]}}}
connector: {{type: linear}}
data: {{train: {{format: table, path: train.csv}}}}
stages: [{{name: align, train: {{connector: 1.0e-3}}, steps: 2, batch_size: 2}}]
eval: {{suites: [three.yaml]}}
"""
    (tmp_path / "small.yaml").write_text(text)
    suite = {"name": "three", "about": "three images", "data": {"format": "table", "path": "train.csv"}}
    (tmp_path / "three.yaml").write_text(json.dumps(suite | {"metrics": ["caption/rouge-l"]}))
    return str(tmp_path / "small.yaml")


def test_verify_refuses_a_recipe_without_suites(recipe_file: str) -> None:
    Path(recipe_file).write_text(Path(recipe_file).read_text().replace("eval: {suites: [three.yaml]}", ""))
    with pytest.raises(MLLMError, match="names no suites"):
        verify.verify(recipe_file, out="results")


def test_verify_trains_evaluates_and_writes_what_the_table_shows(recipe_file: str) -> None:
    path = verify.verify(recipe_file, out="results", seeds=(0, 1), runs="runs")
    content = results.results("small", "results")
    assert content is not None and path == Path("results/small.yaml")
    assert content["items"] == {"three.yaml": 3} and content["seeds"] == [0, 1]
    rows = [
        [json.loads(x) for x in Path(f"runs/small-{seed}/eval/three/predictions.jsonl").read_text().splitlines()]
        for seed in (0, 1)
    ]
    score = metric("caption/rouge-l")
    by_hand = [score([r["prediction"] for r in run_], [r["references"] for r in run_]).value for run_ in rows]
    assert content["scores"]["three.yaml"]["value"] == pytest.approx(sum(by_hand) / 2, abs=1e-4)
    assert f"{sum(by_hand) / 2:.3f}" in results.table(["small"], "results")
    minutes = [json.loads(Path(f"runs/small-{seed}/time.json").read_text())["minutes"] for seed in (0, 1)]
    assert content["minutes"] == round(max(minutes), 1), "not the time of the evaluation, nor of a second run of verify"
    trained = (Path("runs") / "small-0" / "model" / "assembly.json").stat().st_mtime_ns
    verify.verify(recipe_file, out="results", seeds=(0,), runs="runs")
    assert (Path("runs") / "small-0" / "model" / "assembly.json").stat().st_mtime_ns == trained, "trained again"


def test_a_recipes_suites_have_data_and_overrides_of_their_own(recipe_file: str, tmp_path: Path) -> None:
    suites = """[{suite: three.yaml, shots.count: 1, shots: {select: fixed, data: {format: table, path: train.csv}}},
      {suite: files.yaml, data: elsewhere, decoding: {max_new_tokens: 2}}, three.yaml]"""
    Path(recipe_file).write_text(Path(recipe_file).read_text().replace("[three.yaml]", suites))
    (tmp_path / "elsewhere").mkdir()
    for name in "ab":
        tiny_image(ord(name)).save(tmp_path / "elsewhere" / f"{name}.png")
    rows = [{"image": f"{name}.png", "caption": f"noise {name}"} for name in "ab"]
    (tmp_path / "elsewhere" / "rows.json").write_text(json.dumps(rows))
    suite = {"name": "files", "about": "two images", "data": {"format": "table"}, "folder": {"path": "rows.json"}}
    (tmp_path / "files.yaml").write_text(json.dumps(suite | {"metrics": ["caption/rouge-l"]}))
    config = loading.load(recipe_file)
    (tmp_path / "again.yaml").write_text(loading.dump(config))
    assert loading.dump(loading.load(str(tmp_path / "again.yaml"))) == loading.dump(config)
    assert problems(recipe_file) == []
    verify.verify(recipe_file, out="results", seeds=(0,), runs="runs")
    content = results.results("small", "results")
    assert content is not None
    labels = list(content["scores"])
    assert list(content["items"].values()) == [3, 2, 3] and labels[2] == "three.yaml"
    assert 'shots.select="fixed"' in labels[0] and "decoding.max_new_tokens=2" in labels[1]
    (folder,) = Path("runs/small-0/eval").glob("three-shots*")
    one_shot = json.loads((folder / "summary.json").read_text())
    assert one_shot["settings"]["shots"] == "1, fixed"
    answered = CliRunner().invoke(app, ["eval", "runs/small-0", "--baselines", "none", "--out", "reports"])
    assert answered.exit_code == 0, answered.output
    assert len(list(Path("reports").glob("*/summary.json"))) == 3


def test_suites_that_are_wrong_are_named_before_anything_is_trained(recipe_file: str) -> None:
    def named(suites: str) -> str:
        return "\n".join(problems(recipe_file, [f"eval.suites={suites}"]))

    assert "No suite is called 'vqa2'" in named("[vqa2]")
    assert "shot" in named("[{suite: vqav2, shot.count: 4}]")
    assert "vqav2" in named("[vqav2, vqav2]")


def test_only_recipes_whose_suites_are_embedded_are_verified_all_together(recipe_file: str) -> None:
    assert verify.has_embedded_suites("limber-cpu") and verify.has_embedded_suites(recipe_file)
    assert not verify.has_embedded_suites("emoji-scorer")
    text = Path(recipe_file).read_text()
    Path(recipe_file).write_text(text.replace("[three.yaml]", "[three.yaml, {suite: vqav2, shots.count: 4}]"))
    assert not verify.has_embedded_suites(recipe_file)
