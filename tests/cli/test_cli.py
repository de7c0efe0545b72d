"""The command line: status 0, 1 with one message, or 2 for wrong usage; never a traceback unless asked for."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mllm.__main__ import main
from mllm.cli.app import app
from mllm.errors import MLLMError
from mllm.hub.embedded_list import PARTS
from mllm.testing import tiny_image
from mllm.version import __version__

Mllm = Callable[..., tuple[int, str, str]]


@pytest.fixture
def mllm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Mllm:
    """Return a function that runs one command in this process and returns its status, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mllm", *map(str, arguments)])
        capsys.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
            if isinstance(code, str):  # as the interpreter does on its way out
                print(code, file=sys.stderr)
        out, err = capsys.readouterr()
        return (code if isinstance(code, int) else 0 if code is None else 1), out, err

    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}.get(name, "1"))
    return run


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tiny_model(seed=1).save(tmp_path_factory.mktemp("saved") / "model")  # type: ignore[attr-defined]
    return folder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    tiny_image().save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.fixture
def recipe(tmp_path: Path, tiny_parts: tuple[str, str], picture: Path) -> Path:
    (tmp_path / "train.csv").write_text("image,caption\na.png,noise\ngone.png,nothing\n")
    path = tmp_path / "mine.yaml"
    path.write_text(f"""
name: mine
encoder: {{model: {tiny_parts[0]}}}
lm: {{model: {tiny_parts[1]}}}
connector: {{type: linear}}
data: {{train: {{format: table, path: {tmp_path}/train.csv}}}}
stages: [{{name: align, train: [connector], steps: 1}}]
""")
    return path


def fails(result: tuple[int, str, str], message: str) -> None:
    """Assert exit status 1, one message that contains these words, and no traceback."""
    status, _, err = result
    assert status == 1, err
    assert message in err
    assert err.startswith("mllm: ") and err.count("mllm: ") == 1
    assert "Traceback" not in err


def test_caption_and_ask_answer_on_stdout_and_say_nothing_else(mllm: Mllm, model: Path, picture: Path) -> None:
    status, out, err = mllm("caption", model, picture, picture, "--max-new-tokens", 3)
    assert (status, err) == (0, "")
    assert out.count(f"{picture}: ") == 2
    status, out, err = mllm("ask", model, picture, "What is it?", "--max-new-tokens", 3)
    assert (status, err) == (0, "")
    latin = "What is this caf\udce9?"  # how Python gives bytes that are no UTF-8
    fails(mllm("ask", model, picture, latin), "lone surrogate")


@pytest.mark.parametrize("vocabulary", [{}, {"vocabulary": True}])
def test_the_words_of_an_image_are_printed(
    mllm: Mllm, tiny_model: Callable[..., object], picture: Path, tmp_path: Path, vocabulary: dict[str, bool]
) -> None:
    model = tiny_model({"type": "linear", "tokens": 4, **vocabulary})
    folder = model.save(tmp_path / "model")  # type: ignore[attr-defined]
    status, out, err = mllm("caption", folder, picture, "--words", "--jsonl", "--max-new-tokens", 3)
    (words,) = model.words([picture])  # type: ignore[attr-defined]
    assert (status, err, json.loads(out)["words"]) == (0, "", words) and len(words) == 4
    status, out, err = mllm("ask", folder, picture, "What?", "--words", "--max-new-tokens", 3)
    assert (status, err) == (0, "") and out.splitlines()[-1].startswith("  words: ")


def test_stderr_of_a_real_command_holds_no_noise(model: Path, picture: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mllm", "caption", str(model), str(picture), "--max-new-tokens", "2"],
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(f"{picture}: ".encode())


def test_the_door_silences_the_one_warning_of_bitsandbytes_and_no_other() -> None:
    code = """
import logging, sys
sys.argv = ["mllm", "--version"]
from mllm.__main__ import main
try:
    main()
except SystemExit:
    pass
for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes", "mllm"):
    logging.getLogger(name).warning("from %s", name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.split("\n") == ["from bitsandbytes", "from mllm", ""]


def test_unknown_names(mllm: Mllm, model: Path, recipe: Path, picture: Path, tmp_path: Path) -> None:
    fails(mllm("train", "limbercpu"), "No recipe is called 'limbercpu'. Did you mean 'limber-cpu'")
    fails(mllm("train", recipe, "optim.warmpu=3"), "optim.warmpu: unknown key. Did you mean 'warmup'")
    fails(mllm("train", recipe, "seed"), "'seed' is not of the form key=value")
    fails(mllm("train", recipe, "encoder.model=mllm/mobilenet-v3"), "Did you mean 'mllm/mobilenet-v2'")
    fails(mllm("train", recipe, "encoder.model=mllm/mobilenet-v2"), "mllm parts install mllm/mobilenet-v2")
    fails(mllm("parts", "install", "mllm/easyvqa"), "Did you mean 'mllm/easy-vqa'")
    fails(mllm("recipes", "show", "limbre"), "No recipe is called 'limbre'")
    fails(mllm("train", tmp_path / "none.yaml"), "There is no recipe file")
    fails(mllm("caption", tmp_path / "no-run", picture), "There is no model in")
    fails(mllm("eval", model, "--suite", "coco-caption"), "Did you mean 'coco-captions'")
    fails(mllm("eval", model, "--suite", "coco-captions"), "needs --data DIR")
    fails(mllm("eval", model, "--suite", "coco-captions", "--data", tmp_path), "cannot be read")


def test_check_prints_every_problem_and_counts_them(mllm: Mllm, recipe: Path) -> None:
    status, out, _ = mllm("check", recipe)
    assert status == 0
    assert out.startswith("The first training example cannot be shown: ") and "1 of 2 images are missing" in out
    assert out.endswith(f"\n{recipe}: no problems.\n")
    status, out, err = mllm("check", recipe, "encoder.model=./a", "lm.model=./b")
    assert status == 1 and err == f"mllm: {recipe}: 2 problems.\n"
    assert [line[:2] for line in out.splitlines()] == ["- ", "- "]
    assert "./a" in out and "./b" in out
    status, out, err = mllm("check", "limbercpu")
    assert (status, err) == (1, "mllm: limbercpu: 1 problem.\n")
    assert "Did you mean 'limber-cpu'" in out


def test_check_and_data_check_print_examples_with_what_is_learned_marked(mllm: Mllm, recipe: Path) -> None:
    (recipe.parent / "train.csv").write_text("image,caption\na.png,ab\na.png,ab\n")
    words = "│".join("A picture of")
    status, out, _ = mllm("check", recipe, "connector.tokens=4")
    assert (status, out) == (
        0,
        f"align, first example, 20 tokens, 4 learned: <4 visual tokens>│{words}│« │a│b│<|end|>»\n"
        f"{recipe}: no problems.\n",
    )
    _, out, _ = mllm("data", "check", recipe, "connector.tokens=4", "--show", 2)
    lines = [line for line in out.splitlines() if line.startswith("align, example ")]
    assert [line.split(": ")[0] for line in lines] == [f"align, example {n}, 20 tokens, 4 learned" for n in (1, 2)]
    assert all(line.endswith("« │a│b│<|end|>»") for line in lines)


def test_pictures_that_cannot_be_read(mllm: Mllm, model: Path, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no picture")
    fails(mllm("caption", model, tmp_path / "notes.png"), "notes.png is not a readable image")
    fails(mllm("ask", model, tmp_path / "none.png", "What?"), "none.png")
    fails(mllm("train", recipe, "--out", tmp_path / "run"), "1 of 2 images are missing: ")


def test_an_empty_token_does_not_open_the_server(mllm: Mllm, model: Path) -> None:
    status, _, err = mllm("serve", model, "--token", "")
    assert status == 1 and "The token is empty" in err


def test_run_of_another_version(mllm: Mllm, model: Path, picture: Path, tmp_path: Path) -> None:
    label = json.loads((model / "assembly.json").read_text())
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "assembly.json").write_text(json.dumps({**label, "format": 0, "version": "0.0.1"}))
    fails(mllm("caption", tmp_path / "old", picture), "It was written by mllm 0.0.1: load it with that version.")


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["train"],
        ["caption", "run"],
        ["ask", "run", "image"],
        ["eval", "run", "--suite", "x", "--limit", "0"],
        ["caption", "run", "image", "--max-new-tokens", "many"],
        ["train", "limber-cpu", "--no-such-option"],
        ["recipes", "no-such-command"],
    ],
)
def test_wrong_usage_is_status_2(mllm: Mllm, arguments: list[str]) -> None:
    status, _, err = mllm(*arguments)
    assert status == 2
    assert "Usage: mllm " in err and "Traceback" not in err


def test_debug_anywhere_shows_the_error_itself(mllm: Mllm) -> None:
    for arguments in (["--debug", "recipes", "show", "limbercpu"], ["recipes", "show", "limbercpu", "--debug"]):
        with pytest.raises(MLLMError, match="No recipe is called 'limbercpu'"):
            mllm(*arguments)
    command = [sys.executable, "-m", "mllm", "recipes", "show", "limbercpu"]
    plain, debug = (
        subprocess.run([*command, *more], capture_output=True, text=True, check=False) for more in ([], ["--debug"])
    )
    assert (plain.returncode, debug.returncode) == (1, 1)
    assert plain.stderr.startswith("mllm: No recipe is called 'limbercpu'.") and "Traceback" not in plain.stderr
    assert debug.stderr.startswith("Traceback")


def test_lists_and_versions(mllm: Mllm) -> None:
    assert mllm("--version") == (0, f"{__version__}\n", "")
    status, out, _ = mllm("recipes")
    assert status == 0 and "limber-cpu" in [line.split()[0] for line in out.splitlines()]
    assert mllm("recipes", "show", "limber-cpu")[1].startswith("#!/usr/bin/env -S mllm train\n")


def test_part_names_are_whole_on_a_narrow_screen() -> None:

    done = CliRunner().invoke(app, ["parts", "list"], env={"COLUMNS": "80"})
    assert done.exit_code == 0
    assert max(len(line) for line in done.output.splitlines()) <= 80
    for name in PARTS:
        assert name in done.output


def test_many_pictures_are_described_and_a_bad_one_costs_the_others_nothing(
    mllm: Mllm, model: Path, picture: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a.png", "c.png"):
        (folder / name).write_bytes(picture.read_bytes())
    (folder / "b.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("not a picture")
    status, out, err = mllm("caption", model, folder, "--max-new-tokens", "3", "--jsonl")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [Path(row["image"]).name for row in rows] == ["a.png", "b.png", "c.png"]
    assert rows[0]["text"] == rows[2]["text"] and "b.png is not a readable image" in rows[1]["error"]
    assert status == 1 and "1 of 3 images could not be read" in err
    status, out, err = mllm("ask", model, f"{folder}/[ac].png", "What?", "--max-new-tokens", "3")
    assert status == 0
    assert [line.partition(": ")[0] for line in out.splitlines()] == [f"{folder}/{n}.png" for n in "ac"]
    fails(mllm("caption", model, tmp_path / "pictures" / "*.jpg"), "contains no images")


def test_chat_in_the_terminal(
    mllm: Mllm, model: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"/image {picture}", "what is it?", "/imgae x", "/image nowhere.png", f"/save {tmp_path / 'chat.json'}"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*lines, "/help", "/exit", "never read"])))
    status, out, err = mllm("chat", model, "--max-new-tokens", "4")
    assert status == 0 and err == ""
    assert "Did you mean '/image'" in out and "There is no image file 'nowhere.png'" in out and "/reset" in out
    messages = json.loads((tmp_path / "chat.json").read_text())
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert messages[0]["content"][0] == {"type": "image", "image": str(picture)}
    assert " ".join(messages[1]["content"][0]["text"].split()) in " ".join(out.split())
    monkeypatch.setattr(sys, "stdin", io.StringIO("and now?"))
    status, again, _ = mllm("chat", model, "--history", tmp_path / "chat.json", "--max-new-tokens", "4")
    assert status == 0 and again.strip()
    fails(mllm("chat", model, "--history", tmp_path / "none.json"), "cannot be read")
