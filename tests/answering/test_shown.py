"""Images in answers are named in the terminal, and saved where they are no files yet."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mllm.cli.app import app
from mllm.errors import MLLMError, warn_renamed
from mllm.media.images import open_image
from mllm.outputs import ImagePart, Output, Text, data_url, with_files
from mllm.scorers.index import ImageIndex
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
    arguments = [command, str(place / "run"), *more, "--max-new-tokens", "4", "--image-logit-bias", "1e4"]
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
    monkeypatch.setattr("mllm.build.build", lambda _: pytest.fail("a model was built"))
    command = [command[0], str(place / "other"), *command[1:], "--index", str(place / "photos.index")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1 and "built with another model" in str(done.exception)


@pytest.fixture
def painter(tiny_model, tiny_decoder, tmp_path):
    """The run of a model that makes images and has no retrieval head."""
    head = {"type": "generation", "tokens": 2, "length": 1, "width": 32, "dim": 16, "layers": 1, "heads": 2}
    model = tiny_model(heads=[head], tokens=["[IMG0]", "[IMG1]"], decoder={"type": "trained", "model": tiny_decoder})
    model.save(tmp_path / "run")
    return model, tmp_path


@pytest.mark.parametrize("bias", ["1e4", "-1e4"])
@pytest.mark.parametrize("command", ["caption", "ask", "chat"])
def test_without_an_index_images_are_made_and_named(painter, command, bias):
    model, place = painter
    tiny_image(0).save(place / "in.png")
    more = {"caption": ["in.png"], "ask": ["in.png", "what?"], "chat": []}[command]
    more = [str(place / one) if one.endswith("png") else one for one in more]
    options = ["--max-new-tokens", "5", "--image-logit-bias", bias, "--show", str(place / "made")]
    done = CliRunner().invoke(
        app, [command, str(place / "run"), *more, *options], input="see\n", catch_exceptions=False
    )
    files = sorted((place / "made").glob("*.png"))
    assert done.exit_code == 0 and bool(files) == (bias == "1e4")
    assert all(f"[{file}]" in done.output and open_image(file).size == (16, 16) for file in files)
    if command == "chat":
        output = model.chat().show("see", image_logit_bias=float(bias), max_new_tokens=5)
        assert len(output.images) == len(files)
        for file, part in zip(files, output.images, strict=True):
            assert np.array_equal(np.asarray(open_image(file)), np.asarray(part.image))


def test_a_chat_makes_images_unasked(painter, monkeypatch):
    monkeypatch.setattr("mllm.cli.terminal.converse", lambda chat, images, show, **_: asked.append(show))
    asked: list[object] = []
    for run in ("run", "words"):
        if run == "words":
            painter[0].decoder = None
            painter[0].spec.decoder = None
            painter[0].save(painter[1] / "words")
        CliRunner().invoke(app, ["chat", str(painter[1] / run)], catch_exceptions=False)
    assert asked == [{"folder": Path("shown")}, None]


def test_eagerness_without_images_is_refused(tiny_model):
    for model in (tiny_model(), tiny_model(**PARTS)):
        with pytest.raises(MLLMError, match="give an index that the model finds them in, or a model that makes them"):
            model.generate([["a cat"]], image_logit_bias=2.0)


def test_the_former_name_of_the_bias_warns_and_does_the_same(place):
    warn_renamed.cache_clear()
    picture = str(place / "photos/1.png")
    arguments = ["caption", str(place / "run"), picture, "--max-new-tokens", "4", "--eager", "1e4"]
    with pytest.warns(FutureWarning, match="--eager is now called --image-logit-bias"):
        done = CliRunner().invoke(app, [*arguments, "--index", str(place / "photos.index")], catch_exceptions=False)
    assert done.output == said(place, "caption", picture)


def test_eager_in_python_warns_and_is_passed_on(tiny_model):
    warn_renamed.cache_clear()
    with (
        pytest.warns(FutureWarning, match="'eager' is now called 'image_logit_bias'"),
        pytest.raises(MLLMError, match="give an index that the model finds them in"),
    ):
        tiny_model().generate([["a cat"]], eager=2.0)


def test_made_images_are_saved_under_the_next_free_number(tmp_path):
    tiny_image(7).save(tmp_path / "4.png")
    made = ImagePart(Image.new("RGB", (8, 8), "red"), seed=3)
    assert with_files(Output([Text("see "), made, Text(" and "), made]), tmp_path) == (
        f"see [{tmp_path}/5.png] and [{tmp_path}/6.png]"
    )
    assert Image.open(tmp_path / "6.png").getpixel((0, 0)) == (255, 0, 0)
    assert data_url(made).startswith("data:image/jpeg;base64,")
