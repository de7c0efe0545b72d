"""The layout: what is on disk is what is installed, and the core reaches the outer folders by registry name only."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
FOLDERS = {"mllm": "mllm", "adapters": "mllm.adapters", "recipes": "mllm.recipes", "eval": "mllm.eval"}
OUTER = ("mllm.adapters", "mllm.eval", "mllm.recipes", "adapters", "eval", "recipes")
DATA = {".yaml", ".tsv", ".html", ".css", ".typed"}

pytestmark = pytest.mark.skipif(not (ROOT / "recipes").is_dir(), reason="needs the source tree, not an installed copy")


def files(folder: str) -> list[Path]:
    """All files of one top-level folder that belong to the project, relative to the root."""
    found = [path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()]
    return [path for path in found if "__pycache__" not in path.parts]


def installed_as(path: Path) -> str:
    """Return where a file of the source tree is in the wheel."""
    return "/".join([*FOLDERS[path.parts[0]].split("."), *path.parts[1:]])


def test_packages_are_the_folders_that_hold_code() -> None:
    folders = {installed_as(path).rsplit("/", 1)[0] for name in FOLDERS for path in files(name) if path.suffix == ".py"}
    assert sorted(SETUPTOOLS["packages"]) == sorted(folder.replace("/", ".") for folder in folders)
    assert SETUPTOOLS["package-dir"] == {package: folder for folder, package in FOLDERS.items()}
    for package in SETUPTOOLS["packages"]:
        head = max((mapped for mapped in SETUPTOOLS["package-dir"] if f"{package}.".startswith(f"{mapped}.")), key=len)
        rest = package.removeprefix(head).replace(".", "/").lstrip("/")
        assert (ROOT / SETUPTOOLS["package-dir"][head] / rest / "__init__.py").is_file(), package


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built as pip builds it, from a copy: the build leaves nothing in the checkout."""
    pytest.importorskip("setuptools", reason="building a wheel needs setuptools")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def target(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(target: Path, *arguments: str) -> str:
    """Run Python on the unpacked wheel, outside of the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=target.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_wheel_holds_the_code_and_the_data_and_nothing_else(wheel: Path) -> None:
    expected = {installed_as(path) for name in FOLDERS for path in files(name) if path.suffix in {".py", *DATA}}
    assert {Path(name).suffix for name in expected} == {".py", *DATA}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == expected


@pytest.mark.slow
def test_wheel_works_outside_of_the_checkout(target: Path) -> None:
    code = """
import sys
from importlib.resources import files
from importlib.util import find_spec
import mllm, mllm.config.loading
print(mllm.__file__)
print(*mllm.config.loading.names())
mllm.config.loading.load(mllm.config.loading.names()[0])
print(*sorted(entry.name.removesuffix(".yaml") for entry in (files("mllm.eval") / "suites").iterdir()))
print(find_spec("mllm.adapters.connectors.linear").origin)
print([name for name in sys.modules if name.startswith("mllm") and "/checkout/" in str(sys.modules[name].__file__)])
""".replace("/checkout/", f"{ROOT}{os.sep}")
    place, recipes, suites, connector, strays = run(target, "-c", code).splitlines()
    assert Path(place) == target / "mllm" / "__init__.py"
    assert recipes.split() == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    assert suites.split() == sorted(path.stem for path in (ROOT / "eval" / "suites").glob("*.yaml"))
    assert Path(connector) == target / "mllm" / "adapters" / "connectors" / "linear.py"
    assert strays == "[]"
    namespace: dict[str, str] = {}
    exec((ROOT / "mllm" / "version.py").read_text(), namespace)
    assert run(target, "-m", "mllm", "--version").strip() == namespace["__version__"]


@pytest.mark.slow
def test_command_is_an_entry_point(target: Path) -> None:
    (points,) = target.glob("*.dist-info/entry_points.txt")
    assert "mllm = mllm.__main__:main" in points.read_text()


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield every module that a file imports statically, and every name it takes from one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def outside(names: Iterator[str]) -> list[str]:
    return [name for name in names if any(f"{name}.".startswith(f"{outer}.") for outer in OUTER)]


def test_core_and_tests_import_the_outer_folders_by_registry_only() -> None:
    code = "import mllm.eval.evaluate, mllm.evaluation\nfrom mllm import recipes\nfrom mllm.adapters import connectors"
    assert {name.split(".")[1] for name in outside(imports(ast.parse(code)))} == {"eval", "recipes", "adapters"}
    paths = [path for folder in ("mllm", "tests") for path in files(folder) if path.suffix == ".py"]
    assert len(paths) > 30
    found = {str(path): outside(imports(ast.parse((ROOT / path).read_text()))) for path in paths}
    assert {path: names for path, names in found.items() if names} == {}


def test_no_file_imports_relatively() -> None:
    for folder in (*FOLDERS, "tests"):
        for path in files(folder):
            if path.suffix == ".py":
                assert not [n for n in imports(ast.parse((ROOT / path).read_text())) if n.startswith(".")], path


@pytest.mark.parametrize("name", ["adapters", "recipes", "eval"])
def test_outer_folder_under_its_own_name_says_how_to_import_it(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"ImportError: This folder is installed as mllm.{name}: import it by that name" in done.stderr


def test_tracked_files_hold_no_paths_of_a_machine() -> None:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and a checkout")
    homes = re.compile(r"(?<![\w.])(/(home|Users|root|work)/[\w.-]+|[A-Z]:\\Users\\\w+)")
    assert homes.search(" /" + "home/someone/x") and not homes.search("docs/" + "work/x")
    paths = [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    assert len(paths) > 30
    found = {}
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="ignore")
        if hits := [match.group() for match in homes.finditer(text)]:
            found[str(path.relative_to(ROOT))] = hits
    assert found == {}
