"""Images in answers are named in the terminal, and saved where they are no files yet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from mllm.cli import app
from mllm.index import ImageIndex
from mllm.outputs import ImagePart, Output, Text, data_url, with_files
from mllm.testing import tiny_image

PARTS = {"heads": [{"type": "retrieval", "dim": 6}], "tokens": ["[RET]"]}


@pytest.fixture
def place(tiny_model, tmp_path):
    """A run, another one, and an index of the first's."""
    model = tiny_model(**PARTS)
    model.save(tmp_path / "run")
    tiny_model(**PARTS, seed=1).save(tmp_path / "other")
    (tmp_path / "photos").mkdir()
    for number in range(3):
        tiny_image(number).save(tmp_path / "photos" / f"{number}.png")
    ImageIndex.build(model, sorted((tmp_path / "photos").iterdir())).save(tmp_path / "photos.index")
    return tmp_path


def said(place: Path, command: str, *more: str, given: str | None = None) -> str:
    arguments = [command, str(place / "run"), *more, "--max-new-tokens", "4", "--eager", "1e4"]
    done = CliRunner().invoke(
        app, [*arguments, "--index", str(place / "photos.index")], input=given, catch_exceptions=False
    )
    assert done.exit_code == 0
    return done.output


def test_found_images_are_named(place):
    picture, photos = str(place / "photos/1.png"), str(place / "photos")
    for output in (
        said(place, "caption", picture),
        said(place, "ask", picture, "what?"),
        said(place, "chat", picture, given="what is it?\nand now?\n"),
    ):
        assert f"[{photos}/" in output.removeprefix(f"{picture}: ")
    row = json.loads(said(place, "caption", picture, "--jsonl"))
    assert row["image"] == picture and f"[{photos}/" in row["text"]


@pytest.mark.parametrize("command", [["caption", "x.png"], ["ask", "x.png", "what?"], ["chat"], ["serve"]])
def test_another_models_index_is_refused_before_a_model_is_loaded(place, command, monkeypatch):
    monkeypatch.setattr("mllm.checkpoint.build", lambda _: pytest.fail("a model was built"))
    command = [command[0], str(place / "other"), *command[1:], "--index", str(place / "photos.index")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1 and "built with another model" in str(done.exception)


def test_made_images_are_saved_under_the_next_free_number(tmp_path):
    tiny_image(7).save(tmp_path / "4.png")
    made = ImagePart(Image.new("RGB", (8, 8), "red"), seed=3)
    assert with_files(Output([Text("see "), made, Text(" and "), made]), tmp_path) == (
        f"see [{tmp_path}/5.png] and [{tmp_path}/6.png]"
    )
    assert Image.open(tmp_path / "6.png").getpixel((0, 0)) == (255, 0, 0)
    assert data_url(made).startswith("data:image/jpeg;base64,")
