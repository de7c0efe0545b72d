"""A recipe says which runs it stands on (``needs``): they are trained before it, and checked and named before that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import mllm
from mllm.cli.app import app
from mllm.config import loading
from mllm.errors import MLLMError
from mllm.planning.check import problems
from mllm.planning.plan import plan
from mllm.testing import tiny_image
from mllm.training.needs import missing


@pytest.fixture
def folder(tmp_path: Path, tiny_parts: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three recipes: `pixels`, an image decoder; `painter`, which needs it; `second`, which starts from `painter`."""
    monkeypatch.chdir(tmp_path)
    encoder, lm = tiny_parts
    for name in "abc":
        tiny_image().save(tmp_path / f"{name}.png")
    (tmp_path / "train.csv").write_text("image,caption\n" + "".join(f"{name}.png,noise {name}\n" for name in "abc"))
    data = "data: {train: {format: table, path: train.csv}}"
    (tmp_path / "pixels.yaml").write_text(f"""
name: pixels
lm: {{type: sentences, model: {lm}}}
heads: [{{type: pixels, side: 16, features: 64, rank: 8}}]
{data}
cache: "off"
stages: [{{name: fit, fit: {{part: heads.pixels}}}}]
""")
    (tmp_path / "painter.yaml").write_text(f"""
name: painter
needs: [./pixels.yaml]
encoder: {{model: {encoder}}}
lm: {{model: {lm}}}
connector: {{type: linear}}
heads: [{{type: affine, tokens: 1, length: 1, width: 32}}]
decoder: {{type: trained, model: runs/pixels}}
{data}
stages: [{{name: paint, fit: {{part: heads.affine}}}}]
""")
    (tmp_path / "second.yaml").write_text(f"""
name: second
needs: [./painter.yaml, ./pixels.yaml]
encoder: {{model: {encoder}}}
lm: {{model: {lm}}}
connector: {{type: linear}}
{data}
decoder: {{type: trained, model: runs/pixels}}
init: {{from: runs/painter, parts: [heads.affine]}}
heads: [{{type: affine, tokens: 1, length: 1, width: 32}}]
stages: [{{name: align, train: {{connector: 1.0e-3}}, steps: 2, batch_size: 2}}]
""")
    return tmp_path


def test_what_is_not_there_is_trained_first_and_once(folder: Path) -> None:
    assert problems("./second.yaml") == [] and not Path("runs").exists()
    mllm.train("./second.yaml")
    (head,) = mllm.load("runs/second").heads.values()
    (start,) = mllm.load("runs/painter").heads.values()
    assert [tensor.tolist() for tensor in head.state_dict().values()] == [
        tensor.tolist() for tensor in start.state_dict().values()
    ]
    written = {name: Path(f"runs/{name}/model/assembly.json").stat().st_mtime_ns for name in ("pixels", "painter")}
    assert missing(loading.load("./second.yaml")) == []
    mllm.train("./second.yaml")
    for name, time in written.items():
        assert Path(f"runs/{name}/model/assembly.json").stat().st_mtime_ns == time, "trained again"
    assert Path("runs/second-2/model").is_dir()


def test_an_interrupted_need_is_continued(folder: Path) -> None:
    mllm.train("./pixels.yaml", out="whole")
    interrupted = Path("runs/pixels")
    interrupted.mkdir(parents=True)
    (interrupted / "recipe.yaml").write_text(loading.dump(loading.load("./pixels.yaml")))
    mllm.train("./painter.yaml")
    both = [mllm.load(path).heads["pixels"].state_dict() for path in ("whole", interrupted)]
    assert all(both[0][name].equal(both[1][name]) for name in both[0])


def test_a_run_that_overrides_name_is_not_needed(folder: Path) -> None:
    mllm.train("./pixels.yaml", out="elsewhere/mine")
    mllm.train("./painter.yaml", {"decoder.model": "elsewhere/mine"})
    assert not Path("runs/pixels").exists()


def test_check_and_plan_know_the_run_that_is_not_there(folder: Path) -> None:
    recipe = Path("painter.yaml").read_text()
    done = CliRunner().invoke(app, ["check", "./painter.yaml"])
    assert (
        done.exit_code == 0 and "runs/pixels is not there yet: the recipe ./pixels.yaml is trained first" in done.output
    )
    assert any("runs/pixels" in note for note in plan("./painter.yaml").needs)
    Path("painter.yaml").write_text(recipe.replace("width: 32", "width: 8"))
    (wrong,) = problems("./painter.yaml")
    assert "makes conditions of 1 x 8, and the image decoder takes 1 x 32" in wrong
    Path("pixels.yaml").write_text(Path("pixels.yaml").read_text().replace("train.csv", "absent.csv"))
    Path("painter.yaml").write_text(recipe)
    (wrong,) = problems("./painter.yaml")
    assert wrong.startswith("The recipe ./pixels.yaml, which painter needs: ") and "absent.csv" in wrong
    assert not Path("runs").exists()


def test_the_command_refuses_a_wrong_recipe_before_it_trains_a_need(folder: Path) -> None:
    done = CliRunner().invoke(app, ["train", "./painter.yaml", "heads.0.width=8"])
    assert isinstance(done.exception, MLLMError) and "makes conditions of 1 x 8" in done.output
    assert not Path("runs").exists()


def test_a_circle_is_refused(folder: Path) -> None:
    text = Path("pixels.yaml").read_text()
    Path("pixels.yaml").write_text(text.replace("name: pixels", "name: pixels\nneeds: [./second.yaml]"))
    (wrong,) = problems("./painter.yaml")
    assert wrong == "'needs' goes in a circle: painter -> pixels -> second -> painter. Remove one of them."
    Path("pixels.yaml").write_text(text.replace("name: pixels", "name: pixels\nneeds: [./pixels.yaml]"))
    with pytest.raises(MLLMError, match="'needs' goes in a circle: pixels -> pixels"):
        mllm.train("./pixels.yaml")


def test_an_unknown_name_is_refused(folder: Path) -> None:
    text = Path("painter.yaml").read_text().replace("[./pixels.yaml]", "[emoji-decodr]")
    Path("painter.yaml").write_text(text)
    (wrong,) = problems("./painter.yaml")
    assert wrong == "The recipe painter needs 'emoji-decodr': No recipe is called 'emoji-decodr'. Did you mean " + (
        "'emoji-decoder' or 'emoji-scorer'?"
    )
    with pytest.raises(MLLMError, match="needs 'emoji-decodr'"):
        mllm.train("./painter.yaml")


@pytest.mark.parametrize("name", loading.names())
def test_a_recipe_of_the_package_needs_every_run_that_it_names(name: str, folder: Path) -> None:
    config = loading.load(name)
    named = {word for word in loading.dump(config).split() if word.startswith("runs/")}
    assert {str(need.folder) for need in missing(config)} >= named
    assert {Path(folder).name for folder in named} == set(config.needs)


def test_a_need_may_be_the_model_of_a_stage(folder: Path, tiny_parts: tuple[str, str]) -> None:
    parts = f"encoder: {{model: {tiny_parts[0]}}}\nlm: {{model: {tiny_parts[1]}}}\nconnector: {{type: linear}}"
    data = "data: {train: {format: table, path: train.csv}}"
    one = "{name: one, train: {connector: 1.0e-3}, steps: 1, batch_size: 2}"
    two = "{name: two, tokens: ['<x>'], train: {connector: 1.0e-3, tokens: 1.0e-3}, steps: 1, batch_size: 2}"
    (folder / "both.yaml").write_text(f"name: both\n{parts}\n{data}\nstages: [{one}, {two}]\n")
    start = "{from: runs/both/stages/one}"  # the last stage's model would not fit: it has a token more
    last = "{name: last, train: {connector: 0}, steps: 1, batch_size: 2}"
    needs = f"name: after\nneeds: [./both.yaml]\n{parts}\n{data}\ninit: {start}\nstages: [{last}]\n"
    (folder / "after.yaml").write_text(needs)
    assert problems("./after.yaml") == [] and not Path("runs").exists()
    assert any("runs/both is not there yet" in note for note in plan("./after.yaml").needs)
    mllm.train("./after.yaml")
    ours, theirs = (mllm.load(path).trained_state() for path in ("runs/after", "runs/both/stages/one"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
