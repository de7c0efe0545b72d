"""Images that cannot be cut, a pixel, tiles that pass the context: an answer, or one message that names the image."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import mllm
from mllm.errors import MLLMError
from mllm.testing import tiny_lm

TILES: dict[str, dict[str, Any]] = {
    "anyres": {"kind": "anyres"},
    "dynamic": {"kind": "dynamic", "most": 4},
    "split": {"kind": "split", "longest": 2},
}
LONG, HIGH, PIXEL, LARGE = (Image.new("RGB", size) for size in ((1000, 1), (1, 1000), (1, 1), (64, 64)))
TOO_LONG = r"{name}: 1000 x 1 pixels, .* aspect ratio of at most 200 .*Crop it\.$"
NO_ROOM = r"{name}: \d+ tokens\).*context is 60 tokens.*let the encoder give an image or a video fewer tokens\.$"


@pytest.fixture(scope="module", params=TILES)
def model(request: pytest.FixtureRequest, tiny_parts: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model whose context has room for the tiles of a square image, but not for much text besides."""
    lm = tiny_lm(tmp_path_factory.mktemp("lm"), context=160)
    return mllm.assemble({"model": tiny_parts[0], "tiles": TILES[request.param]}, lm, "linear", device="cpu")


@pytest.fixture(scope="module", params=TILES)
def short(request: pytest.FixtureRequest, tiny_parts: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model whose context has no room for the tiles of a large image."""
    lm = tiny_lm(tmp_path_factory.mktemp("lm"), context=60)
    return mllm.assemble({"model": tiny_parts[0], "tiles": TILES[request.param]}, lm, "linear", device="cpu")


def ways(model: Any, image: Any) -> dict[str, Callable[[], Any]]:
    """Return the ways to ask about an image, beside one that is fine."""
    return {
        "generate": lambda: model.generate([["a"], ["a", image, "b"]], max_new_tokens=2),
        "see": lambda: model.see([image, "a"]),
        "see more": lambda: model.see(["a"]).see([image]),
        "views": lambda: model.see_each([["a"], [image]]),
        "chat": lambda: model.chat().send("What?", [image], max_new_tokens=2),
        "score": lambda: model.score([image], ["a"]),
    }


@pytest.mark.parametrize("way", ways(None, None))
@pytest.mark.parametrize("source", ["file", "image"])
def test_an_elongated_image_is_one_message_that_names_it(model: Any, tmp_path: Path, way: str, source: str) -> None:
    """The advice is on the image: in a chat, dropping earlier turns would not help."""
    LONG.save(tmp_path / "long.png")
    image, name = (tmp_path / "long.png", "long.png") if source == "file" else (LONG, "the image of 1000 x 1 pixels")
    with pytest.raises(MLLMError, match=TOO_LONG.format(name=name)):
        ways(model, image)[way]()


@pytest.mark.parametrize("way", ways(None, None))
def test_tiles_that_pass_the_context_are_one_message_that_names_the_image(short: Any, tmp_path: Path, way: str) -> None:
    LARGE.save(tmp_path / "large.png")
    with pytest.raises(MLLMError, match=NO_ROOM.format(name="large.png")):
        ways(short, tmp_path / "large.png")[way]()


@pytest.mark.parametrize("way", ways(None, None))
def test_one_pixel_is_an_image(model: Any, way: str) -> None:
    assert ways(model, PIXEL)[way]() is not None


def asked(*urls: str) -> list[dict[str, Any]]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [*images, {"type": "text", "text": "?"}]


def test_the_server_names_the_image_of_a_request(model: Any, short: Any, serve: Any, data_url: Any) -> None:
    """By its number, since all of them are data URLs; the request beside it is answered."""
    status, body = serve(model).ask(asked(data_url(PIXEL), data_url(HIGH)))
    assert status == 400 and "image 2, a data URL: 1 x 1000 pixels" in json.loads(body)["error"]["message"]
    assert serve(model).ask(asked(data_url(PIXEL)))[0] == 200
    status, body = serve(short).ask(asked(data_url(LARGE)))
    message = json.loads(body)["error"]["message"]
    assert status == 400 and "image 1, a data URL: " in message and "context is 60 tokens" in message


def questions(folder: Path, *rows: tuple[Image.Image, str]) -> list[str]:
    """Write questions about images, and return the overrides of a suite that asks them."""
    table = []
    for number, (image, question) in enumerate(rows):
        image.save(folder / f"{number}.png")
        table.append({"image": f"{number}.png", "question": question, "answer": "a"})
    (folder / "rows.json").write_text(json.dumps(table))
    return [
        f"data={{format: table, path: {folder}/rows.json}}",
        "metrics=[vqa/exact-match]",
        "decoding.max_new_tokens=4",
    ]


def test_an_evaluation_leaves_out_images_that_cannot_be_cut(model: Any, tmp_path: Path) -> None:
    overrides = questions(tmp_path, (PIXEL, "x"), (LONG, "y"), (LARGE, "z"))
    report = mllm.evaluate(model, "emoji-questions", overrides=overrides)
    (skipped,) = report.summary["skipped"]["items"].values()
    assert "1.png: 1000 x 1 pixels" in skipped
    assert len(report.rows) == 2


@pytest.mark.parametrize("baseline", ["shuffled", "mean-image"])
def test_an_evaluation_leaves_out_what_does_not_fit_with_a_baselines_image(
    tiny_parts: tuple[str, str], tmp_path: Path, baseline: str
) -> None:
    """A long question fits with its small image, and not with a large one of another item."""
    encoder = {"model": tiny_parts[0], "tiles": {"kind": "dynamic", "most": 4}}
    model: Any = mllm.assemble(encoder, tiny_lm(tmp_path / "lm", context=160), "linear", device="cpu")
    fine = [(LARGE, word) for word in "abc"]
    overrides = questions(tmp_path, (PIXEL, "x" * 90), *fine)
    assert model.generate([[PIXEL, "Question: " + "x" * 90 + " Answer:"]], max_new_tokens=4)
    report = mllm.evaluate(model, "emoji-questions", overrides=overrides, baselines=[baseline])
    (skipped,) = report.summary["skipped"]["items"].values()
    assert skipped.startswith(f"With the image of the baseline {baseline}: ") and "context is 160 tokens" in skipped
    assert len(report.rows) == 3
