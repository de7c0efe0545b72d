"""What the pages, the Makefile and the lists beside them say is so: examples run, names exist, nothing is stale."""

from __future__ import annotations

import html
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file
from typer.main import get_command
from typer.testing import CliRunner

from mllm.builtin import BUILT_IN
from mllm.cli.app import app
from mllm.data.emoji.image import Scene
from mllm.planning.data_check import inspect
from mllm.version import __version__

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PACKAGES = ("mllm", "adapters", "eval")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(page: str | Path) -> list[list[str]]:
    """Return the arguments of every `mllm ...` line of a page's shell blocks."""
    lines = "\n".join(blocks(str(page), "sh")).splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("mllm ")]


def mllm(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def saved_shapes(folder: str) -> dict[str, list[int]]:
    (file,) = Path(folder).glob("*.safetensors")
    return {name: list(tensor.shape) for name, tensor in load_file(file).items()}


@pytest.mark.installed
def test_the_readmes_example_runs_as_it_stands(need, tmp_path, monkeypatch):
    need("mllm/mobilenet-v2", "mllm/smollm2-135m")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "example.py").write_text(blocks("README.md", "python")[0])
    names = runpy.run_path("example.py")
    prompt = [[names["image"], "A picture of"], ["The sky is"]]
    assert [str(text) for text in names["same"].generate(prompt, max_new_tokens=8)] == list(map(str, names["texts"]))
    assert len(names["answers"]) == 2
    assert len(names["scores"]) == 2 and max(names["scores"]) < 0
    assert saved_shapes("my-model") == {"connector.project.weight": [576, 1280], "connector.project.bias": [576]}


def test_the_answering_page_runs_as_it_stands(tiny_parts, tmp_path, monkeypatch):
    from mllm import assemble

    assemble(tiny_parts[0], tiny_parts[1]).save(tmp_path / "runs" / "limber-cpu")
    monkeypatch.chdir(tmp_path)
    Path("page.py").write_text("\n".join(blocks("docs/answering.md", "python")))
    names = runpy.run_path("page.py")
    assert len(names["texts"]) == 2 and [len(own) for own in names["answers"]] == [2, 1]
    assert Path("chat.json").is_file()


def tree() -> set[str]:
    """Return the paths of the README's tree; two spaces are one level, and a line may name several files."""
    paths: set[str] = set()
    folders: list[str] = []
    for line in blocks("README.md", "text")[0].splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split(", ")
        level = (len(line) - len(line.lstrip())) // 2
        folders[level:] = [names[0]]
        paths |= {"".join([*folders[:level], name]) for name in names}
    return paths


def test_the_readmes_tree_is_the_disks():
    assert len(blocks("README.md", "text")[0].splitlines()) < 45
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)  # not what a user put beside
    top = {re.sub("/.*", "/", name) for name in git.stdout.splitlines() if name[0] != "."} | {".ci/run"}
    modules = {f"mllm/{path.name}" for path in (ROOT / "mllm").glob("*.py")}
    folders = {f"{path.parent.relative_to(ROOT)}/" for name in PACKAGES for path in (ROOT / name).glob("*/__init__.py")}
    assert len(modules) > 10 and "adapters/connectors/" in folders
    assert sorted(tree()) == sorted(top | modules | folders | {"eval/suites/"})


STRUCTURE = ROOT / "docs" / "structure.md"


def test_paths_on_the_page_on_structure_exist() -> None:
    paths = set(re.findall(r"`((?:mllm|adapters|eval|tests|recipes)/[\w/.-]*)`", STRUCTURE.read_text()))
    assert len(paths) > 50 and sorted(path for path in paths if not (ROOT / path).exists()) == []


def test_what_the_page_on_structure_finds_in_a_file_is_there() -> None:
    cell = r"`([\w.]+)`(?: and `([\w.]+)`)?, `((?:mllm|adapters|eval)/[\w/]+)\.py`"
    rows = re.findall(cell, STRUCTURE.read_text())
    assert len(rows) > 12
    for *names, path in rows:
        module = import_module(f"{'' if path.startswith('mllm') else 'mllm.'}{path.replace('/', '.')}")
        for name in filter(None, names):
            assert attrgetter(name)(module), (name, path)


def test_the_page_on_structure_has_a_row_for_every_folder() -> None:
    rows = re.findall(r"^\| `([\w/]+/)` \|", STRUCTURE.read_text(), flags=re.MULTILINE)
    inits = {path for name in PACKAGES for path in (ROOT / name).glob("*/**/__init__.py")}
    suites = {ROOT / "eval" / "suites"}  # no code
    assert sorted(rows) == sorted(f"{folder.relative_to(ROOT)}/" for folder in {path.parent for path in inits} | suites)


def test_the_layers_on_the_page_on_structure_are_those_that_the_imports_keep() -> None:
    lines = blocks("docs/structure.md", "text")[0].splitlines()
    floors = re.findall(r'^FLOORS = """\n(.*?)\n"""', (ROOT / "tests" / "test_floors.py").read_text(), re.M | re.S)[0]
    assert [re.split(r"\s{2,}", line)[0] for line in lines] == floors.splitlines()


def test_changelog_and_version_agree():
    assert re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[0] == __version__


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target.startswith("https://") or (page.parent / target.partition("#")[0]).exists(), target


def test_the_index_lists_every_page():
    indexes = [page for page in PAGES if page.name == "index.md"]
    for index in indexes:
        listed = set(re.findall(r"\]\(([^)/]+\.md)\)", index.read_text()))
        assert listed == {page.name for page in PAGES if page.parent == index.parent} - {"index.md"}
    folders = {f"({index.relative_to(ROOT / 'docs')})" for index in indexes} - {"(index.md)"}
    assert len(folders) == 2 and all(folder in (ROOT / "docs" / "index.md").read_text() for folder in folders)


def nav_pages(nav: Any) -> list[str]:
    """Return the pages of a navigation of mkdocs, sections included, in order."""
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in nav_pages(entry)]


def test_the_sites_navigation_lists_every_page_once():
    listed = nav_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(str(page.relative_to(ROOT / "docs")) for page in PAGES[1:])


def test_links_out_of_the_docs_lead_to_copies_on_the_site():
    rewritten = runpy.run_path(str(ROOT / "scripts" / "site_links.py"))["rewritten"]
    assert rewritten("[a](../../recipes/gill.yaml)", "recipes/gill.md") == "[a](../files/recipes/gill.yaml)"
    assert rewritten("[a](../recipes/gill.yaml)", "retrieval.md") == "[a](files/recipes/gill.yaml)"
    for inside in ("[a](../log.md)", "[a](../retrieval.md#generating-images)", "[a](../../recipes/no-such.yaml)"):
        assert rewritten(inside, "recipes/gill.md") == inside


def test_the_recipes_pages_say_what_the_recipes_and_their_results_do(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipes", "--check"])
    runpy.run_path(str(ROOT / "scripts" / "recipes"), run_name="__main__")  # exits where a page differs


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_the_pages_exist_and_take_these_arguments(page):
    for arguments in commands(page):
        command: Any = get_command(app)
        name = "mllm"
        while arguments and arguments[0] in getattr(command, "commands", {}):
            name, *arguments = arguments
            command = command.commands[name]
        assert name != "mllm" and "not in this version" not in (command.help or ""), (page.name, name)
        command.make_context(name, arguments)  # an unknown option, or an argument too many, raises


def test_commands_are_found_on_the_pages():
    assert ["ask", "runs/mine", "pictures/red-2.png", "What colour is it?"] in commands("docs/your-own-data.md")
    assert len(commands("README.md")) >= 6


def test_your_own_data_works_as_written(tiny_parts, tmp_path, monkeypatch):
    page = "docs/your-own-data.md"
    monkeypatch.chdir(tmp_path)
    (table,), (recipe,) = blocks(page, "csv"), blocks(page, "yaml")
    Path("train.csv").write_text(table)
    Path("val.csv").write_text(table)
    Path("mine.yaml").write_text(recipe)
    Path("pictures").mkdir()
    for name in set(re.findall(r"^(\w+)-\d\.png", table, flags=re.MULTILINE)):
        for number in (1, 2):
            Image.new("RGB", (24, 24), name).save(f"pictures/{name}-{number}.png")
    tiny = [f"encoder.model={tiny_parts[0]}", f"lm.model={tiny_parts[1]}", "stages.1.steps=2", "stages.1.batch_size=2"]
    check, look, train, caption, ask = commands(page)
    mllm(*check, *tiny)
    assert look[:2] == ["data", "check"]
    found, shared = inspect(look[2], tiny)
    assert not any(source.problems for source in found) and len(shared) == 1  # here both tables are the same
    assert "runs/mine" in mllm(*train, *tiny)
    assert saved_shapes("runs/mine/model")["connector.project.bias"] == [32] and Path("runs/mine/loss.png").is_file()
    assert mllm(*caption).startswith("pictures/red-1.png: ")
    mllm(*ask)


def test_the_reference_is_up_to_date_in_any_terminal():
    terminal = {"COLUMNS": "40", "TERM": "xterm-256color", "FORCE_COLOR": "1"}
    script = [sys.executable, str(ROOT / "scripts" / "reference"), "--check"]
    done = subprocess.run(script, env={**os.environ, **terminal}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make on a copy of the Makefile, where it can do no harm."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    return subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True)


def test_the_demo_takes_a_free_folder_and_commands_that_exist(tmp_path):
    for taken in ("demo", "demo-2"):
        (tmp_path / "runs" / taken).mkdir(parents=True)
    done = make(tmp_path, "--dry-run", "demo", "LIMIT=5", "SET=connector.tokens=6")
    lines = [line.strip() for line in done.stdout.splitlines()]
    ran = [line.removeprefix(".venv/bin/mllm ") for line in lines if line.startswith(".venv/bin/mllm ")]
    assert "train demo connector.tokens=6 --out runs/demo-3" in ran
    assert "eval runs/demo-3 --suite $suite --limit 5; \\" in ran
    assert ".venv/bin/python -m mllm.cli.demo runs/demo-3" in lines


def test_the_demos_suites_exist():
    suites = re.findall(r"^SUITES := (.*)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[0].split()
    assert suites and all((ROOT / "eval" / "suites" / f"{suite}.yaml").is_file() for suite in suites)


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ('case "$2" in *version_info*) exit 1;; esac; echo "Python 3.9.2"', "expected Python 3.11 or later"),
        ('case "$2" in *ensurepip*) exit 1;; esac', "apt-get install python3-venv"),
    ],
)
def test_an_interpreter_that_will_not_do_gets_a_clear_message(tmp_path, says, message):
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!/bin/sh\n{says}\n")
    interpreter.chmod(0o755)
    done = make(tmp_path, f"PYTHON={interpreter}", ".venv/.installed")
    assert done.returncode != 0 and message in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_a_missing_interpreter_gets_a_clear_message(tmp_path):
    done = make(tmp_path, "PYTHON=no-such-python", ".venv/.installed")
    assert done.returncode != 0 and "There is no no-such-python" in done.stderr


def test_constraints_pin_every_dependency_and_nothing_else_than_versions():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    assert all(re.fullmatch(r"[\w.-]+==\d[\w.]*", line) for line in lines)
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    own = next(line for line in extras["dev"] if line.startswith("mllm-assembly["))
    chosen = re.findall(r"[\w-]+", own.removeprefix("mllm-assembly"))
    wanted = project["dependencies"] + [line for name in ("dev", *chosen) for line in extras[name] if line != own]
    names = {re.split("[<>=]", requirement)[0].lower() for requirement in wanted}
    assert names - pinned == set()


def test_hooks_run_what_make_lint_runs():
    lint = (ROOT / "Makefile").read_text().replace("$(BIN)", ".venv/bin").splitlines()
    hooks = re.findall(r"entry: (.*?), language", (ROOT / ".pre-commit-config.yaml").read_text())
    assert [hook for hook in hooks if f"\t{hook}" not in lint] == [".venv/bin/python scripts/reference --check"]
    assert len(hooks) == 4


@pytest.mark.parametrize("script", [".ci/run", "scripts/recipes", "scripts/reference"])
def test_scripts_can_be_run(script):
    assert os.access(ROOT / script, os.X_OK)


@pytest.mark.installed
def test_the_demos_pictures_are_the_same_every_time(need, tmp_path):
    from mllm.cli.demo import write_images

    need("mllm/openmoji")
    first, second = write_images(tmp_path / "a"), write_images(tmp_path / "b")
    assert [path.name for path in first] == ["1.png", "2.png", "3.png", "4.png"]
    pixels = [Image.open(path).tobytes() for path in first]
    assert pixels == [Image.open(path).tobytes() for path in second]
    assert len(set(pixels)) == 4


def test_the_demos_scenes_are_of_one_object_of_several_kinds_and_of_several_of_a_kind():
    from mllm.cli.demo import scenes

    first, second, kinds, number = [cast(Scene, shown.caption.images[0]).things for shown in scenes()]
    assert len(first) == len(second) == 1
    assert len({thing.kind for thing in kinds}) == 2
    assert len(number) > 1 and len({thing.kind for thing in number}) == 1
    for shown in scenes():
        assert shown.question.images == shown.caption.images and shown.question.question


@pytest.mark.installed
def test_the_demos_page_has_the_models_caption_words_and_answer(need, tmp_path, tiny_parts):
    import mllm
    from mllm.cli.demo import show

    need("mllm/openmoji")
    mllm.assemble(tiny_parts[0], tiny_parts[1], {"type": "linear", "tokens": 4}).save(tmp_path / "model")
    page = show(tmp_path)
    model, text = mllm.load(tmp_path), html.unescape(page.read_text(encoding="utf-8"))
    for number in range(1, 5):
        image = tmp_path / "pictures" / f"{number}.png"
        assert image.is_file() and f"pictures/{number}.png" in text
        assert "".join(word for word, _ in groupby(model.words([image])[0]) if word.strip() != ".").strip() in text
    assert text.count("<tr>") == 4 and "right: a love letter" in text


def test_the_page_on_evaluation_names_every_suite_and_metric() -> None:
    page = (ROOT / "docs/evaluation.md").read_text()
    suites, metrics = import_module("mllm.eval.suite").suite_names(), BUILT_IN["metrics"]
    missing = [name for name in [*suites, *metrics] if f"`{name}`" not in page]
    assert not missing
