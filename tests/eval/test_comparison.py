"""Variations of a recipe: each is trained and evaluated once, and compared with the recipe as it stands."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mllm.cli.app import app
from mllm.errors import MLLMError
from mllm.evaluation import metric
from mllm.testing import tiny_image

comparison: Any = import_module("mllm.eval.comparison")
variations: Any = import_module("mllm.eval.variations")

TOKENS, SUITES = "connector.tokens=1,9", "names.yaml,bleu.yaml"


def write_recipe(folder: Path, tiny_parts: tuple[str, str]) -> str:
    """Write a recipe on tiny parts, and two suites of three images."""
    for index, name in enumerate("abc"):
        tiny_image(index).save(folder / f"{name}.png")
    (folder / "train.csv").write_text("image,caption\n" + "".join(f"{name}.png,noise {name}\n" for name in "abc"))
    (folder / "small.yaml").write_text(f"""
name: small
encoder: {{model: {tiny_parts[0]}}}
lm: {{model: {tiny_parts[1]}}}
connector: {{type: linear, tokens: 4}}
decoding: {{max_new_tokens: 8}}
data: {{train: {{format: table, path: train.csv}}}}
stages:
  - {{name: align, train: {{connector: 0.1}}, steps: 12, batch_size: 2, checkpoint_every: 5, optim: {{warmup: 2}}}}
eval: {{suites: [names.yaml]}}
""")
    suite = {"name": "names", "about": "three", "data": {"format": "table", "path": "train.csv"}}
    (folder / "names.yaml").write_text(json.dumps(suite | {"metrics": ["caption/rouge-l", "caption/bleu-1"]}))
    decided = {**suite, "name": "bleu", "metrics": ["caption/bleu-1"], "batch_size": 2}
    (folder / "bleu.yaml").write_text(json.dumps(decided))
    return str(folder / "small.yaml")


@pytest.fixture
def recipe(tmp_path: Path, tiny_parts: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe and its suites in the working directory."""
    monkeypatch.chdir(tmp_path)
    return write_recipe(tmp_path, tiny_parts)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, tiny_parts: tuple[str, str]) -> Any:
    """Two variations of a recipe, compared with it in ``whole``; the working directory is the recipe's."""
    folder = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        recipe = write_recipe(folder, tiny_parts)
        yield comparison.compare_variations(recipe, vary=[TOKENS], suites=SUITES, seeds=(0, 1), out="whole")


def predictions(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "predictions.jsonl").read_text().splitlines()]


def test_killed_at_any_moment_it_continues_to_the_values_of_eval(compared: Any, start: Callable[..., Any]) -> None:
    arguments = ["recipes", "compare", "small.yaml", "--vary", TOKENS, "--suites", SUITES, "--seeds", "2"]
    for lines in (7, 20, 38):  # in the first run, in the second, in the fourth
        process, until = start(*arguments, "--out", "killed"), time.monotonic() + 120
        while sum(len(log.read_text().splitlines()) for log in Path("killed").glob("runs/*/log.jsonl")) < lines:
            assert time.monotonic() < until and process.running(), process.finish()
            time.sleep(0.002)
        process.kill()
    done = [path for path in Path("killed/runs").iterdir() if (path / "model/assembly.json").is_file()]
    written = {path: (path / "model/assembly.json").stat().st_mtime_ns for path in done}
    evaluated = {path: path.stat().st_mtime_ns for path in Path("killed").glob("runs/*/eval/*/report.html")}
    assert done and evaluated
    again = CliRunner().invoke(app, [*arguments, "--out", "killed"])
    assert again.exit_code == 0, again.output
    assert {path: (path / "model/assembly.json").stat().st_mtime_ns for path in done} == written, "trained again"
    assert {path: path.stat().st_mtime_ns for path in evaluated} == evaluated, "evaluated again"
    assert Path("killed/table.md").read_text() == Path("whole/table.md").read_text()
    content = json.loads(Path("killed/comparison.json").read_text())
    assert [row["label"] for row in content["rows"]] == ["small", "connector.tokens=1", "connector.tokens=9"]
    for row in content["rows"]:
        for suite in ("names", "bleu"):
            entries = row["results"][f"{suite}.yaml"]
            run = Path(entries["evaluations"][0]).parent.parent
            options = ["--suite", f"{suite}.yaml", "--baselines", "none", "--out", f"{run}/again-{suite}"]
            assert CliRunner().invoke(app, ["eval", str(run), *options]).exit_code == 0
            summary = json.loads(Path(f"{run}/again-{suite}/summary.json").read_text())
            assert [each["value"] for each in summary["metrics"]] == [
                entry["values"][0] for entry in entries["metrics"]
            ]


def test_the_gain_is_that_over_the_recipe_as_it_stands(compared: Any) -> None:
    score = metric("caption/rouge-l")
    means = []
    for row in compared.rows:
        answers = [predictions(folder) for folder in row.results["names.yaml"].evaluations]
        by_hand = [score([r["prediction"] for r in rows], [r["references"] for r in rows]).value for rows in answers]
        means.append(sum(by_hand) / 2)
        entry = row.results["names.yaml"].metrics[0]
        assert entry.value == pytest.approx(means[-1])
        assert entry.low - 1e-9 <= entry.value <= entry.high + 1e-9
    assert len({round(mean, 6) for mean in means}) > 1, "the variations answer alike, so nothing is shown"
    assert compared.rows[0].results["names.yaml"].metrics[0].gain is None
    for row, mean in zip(compared.rows[1:], means[1:], strict=True):
        for entry in row.results["names.yaml"].metrics:  # bleu-1 is no mean over items
            assert entry.gain_low - 1e-9 <= entry.gain <= entry.gain_high + 1e-9
        assert row.results["names.yaml"].metrics[0].gain == pytest.approx(mean - means[0])


def test_variations_of_decoding_share_a_run_and_answer_differently(recipe: str) -> None:
    made = comparison.compare_variations(
        recipe, vary=["decoding.max_new_tokens=8,2", "stages.0.decoding.do_sample=false"], seeds=(0,), out="out"
    )
    (run,) = Path("out/runs").iterdir()
    assert [row.label for row in made.rows][1:] == [
        "decoding.max_new_tokens=8, stages.0.decoding.do_sample=false",
        "decoding.max_new_tokens=2, stages.0.decoding.do_sample=false",
    ]
    longest = [
        [len(r["prediction"]) for r in predictions(row.results["names.yaml"].evaluations[0])] for row in made.rows
    ]
    assert longest[0] == longest[1] and max(longest[2]) <= 2 < max(longest[0])
    options = ["--suite", "names.yaml", "--baselines", "none", "--out", "short"]
    assert CliRunner().invoke(app, ["eval", str(run), "decoding.max_new_tokens=2", *options]).exit_code == 0
    rows = predictions("short")
    assert [r["prediction"] for r in rows] == [
        r["prediction"] for r in predictions(made.rows[2].results["names.yaml"].evaluations[0])
    ]


def test_a_combination_that_is_the_recipe_as_it_stands_is_its_run(recipe: str) -> None:
    made = comparison.compare_variations(recipe, vary=["connector.tokens=4"], seeds=(0,), out="out")
    assert len(list(Path("out/runs").iterdir())) == 1
    assert [row.results["names.yaml"].metrics[0].gain for row in made.rows] == [None, 0.0]


def test_keys_change_together_and_in_all_combinations(recipe: str) -> None:
    def labels(*vary: str) -> list[str]:
        return [each.label for each in variations.combinations(recipe, [], list(vary))]

    assert labels("connector.tokens=1,4", "optim.clip=0.5,null") == [
        "",
        "connector.tokens=1, optim.clip=0.5",
        "connector.tokens=1, optim.clip=null",
        "connector.tokens=4, optim.clip=0.5",
        "connector.tokens=4, optim.clip=null",
    ]
    adapters = "adapters,stages.0.train=[[{type: lora, r: 2}], {adapters: 1.0e-3}], [[], {lm: 1.0e-5}]"
    assert labels(adapters) == [
        "",
        "adapters=[{type: lora, r: 2}], stages.0.train={adapters: 0.001}",
        "adapters=[], stages.0.train={lm: 1e-05}",
    ]
    assert labels("adapters=[{type: lora, r: 2}, {type: prompt}]")[1:] == [
        "adapters={type: lora, r: 2}",
        "adapters={type: prompt}",
    ]


WRONG = [
    (["conector.tokens=1"], r"conector.tokens=1: Recipe [\s\S]* unknown key. Did you mean 'connector'"),
    (["connector.tokens=1,many"], "- connector.tokens=many: "),
    (["connector.tokens=4,0", "optim.clip=1"], "- connector.tokens=0, optim.clip=1: "),
    (["lm.model=./nowhere"], "- lm.model=./nowhere: There is no folder './nowhere'"),
    (["connector.tokens=4,4"], "connector.tokens=4 and connector.tokens=4 are the same model"),
    (["adapters={type: prompt},[{type: prompt}]"], "are the same model"),
    (["connector.tokens=4", "connector.tokens=1"], "connector.tokens is there twice"),
    (["seed=1,2"], "--seeds gives the seeds"),
    (["eval.limit=1,2"], "--suites and --limit say what is evaluated"),
    (["connector.tokens"], "expected KEY=VALUE,VALUE"),
    (["connector.tokens=}"], "expected values with commas"),
    (["adapters,stages.0.train=[[]]"], r"adapters,stages.0.train=\[V, V\]"),
]


@pytest.mark.parametrize(("vary", "message"), WRONG)
def test_what_is_wrong_is_refused_before_anything_is_trained(recipe: str, vary: list[str], message: str) -> None:
    with pytest.raises(MLLMError, match=message):
        comparison.compare_variations(recipe, vary=vary, out="out")
    assert not Path("out").exists()


def test_a_wrong_suite_is_refused_before_anything_is_trained(recipe: str) -> None:
    for suites, message in (
        ("name.yaml", "name.yaml"),
        ("names.yaml,names.yaml", "expected each once"),
        ("vqav2", "needs --data DIR"),
    ):
        with pytest.raises(MLLMError, match=message):
            comparison.compare_variations(recipe, vary=[TOKENS], suites=suites, out="out")
    assert not Path("out").exists()


def test_the_page_has_runs_by_suites_and_leads_to_the_reports(recipe: str) -> None:
    words = 'prompt.caption="<b>&",words'
    made = comparison.compare_variations(recipe, ["stages.0.steps=2"], vary=[words], seeds=(0, 1), limit=2, out="out")
    page = Path("out/report.html").read_text()
    assert "prompt.caption=&lt;b&gt;&amp;" in page and "<b>" not in page and "{{" not in page
    links = re.findall(r'href="([^"]+)"', page)
    assert len(links) == 3 * 2 and all(Path("out", link).is_file() for link in links)
    for row in made.rows:
        entry = row.results["names.yaml"].metrics[0]
        assert f">{entry.value:.3f}</span>" in page and row.results["names.yaml"].items == 2
    assert "gain over small" in page
