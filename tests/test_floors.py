"""The floors: a folder imports from floors below its own, no module is in a circle, and nothing grows too long."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"mllm": "mllm", "adapters": "mllm.adapters", "eval": "mllm.eval"}

# From the ground up; what shares a line may import each other, as long as no circle comes of it.
FLOORS = """
errors version
system processes devices builtin registry testing
config media hub
prompts outputs
inputs
slots capabilities lms
encoders model vision parts guides engines
readout adapters
objectives rewards data saving evaluation
fits scorers decoders export transfer
answering
assembly serve
build assembling
training planning
eval
cli __init__ __main__
""".strip().splitlines()

# Rules that follow from what things are. The floors hold most of them; they are named for whoever moves a floor.
NEVER = {
    "a frozen part does not know answering": ("lms encoders slots", "answering serve assembly"),
    "the flow of a batch does not know what is done with a model": ("model", "answering scorers decoders export"),
    "answering needs no loss and no closed form": ("answering scorers serve assembly", "objectives fits training"),
    "a closed form needs no loss": ("fits", "objectives training"),
    "a reader knows no loss and no answers": ("data", "objectives fits answering training"),
    "nothing below it opens a run": ("slots lms encoders model readout scorers decoders answering assembly", "build"),
    "a part that is trained knows no recipe": ("adapters", "config build training data"),
    "the server and the commands compute nothing themselves": ("serve", "training objectives fits eval"),
}

pytestmark = pytest.mark.skipif(not (ROOT / "recipes").is_dir(), reason="needs the source tree, not an installed copy")


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name, parsed."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *(part for part in parts if part != "__init__")))
            found[name] = ast.parse(path.read_text())
    return found


def imported(tree: ast.Module) -> Iterator[str]:
    """Yield the modules of the package that one imports, in functions too; for a type checker alone does not count."""
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and (node.module or "").split(".")[0] == "mllm"
            and id(node) not in for_types
        ):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in modules() else str(node.module)


def room(module: str) -> str:
    """Return the folder of a module, or its file at the top."""
    _, _, rest = module.partition(".")
    return rest.split(".")[0] or "__init__"


def floor(name: str) -> int:
    (number,) = [number for number, line in enumerate(FLOORS) if name in line.split()]
    return number


def test_every_folder_has_a_floor() -> None:
    assert sorted({room(module) for module in modules()}) == sorted(" ".join(FLOORS).split())


def test_no_module_imports_from_a_floor_above() -> None:
    upward = [
        f"{module} imports {other}"
        for module, tree in modules().items()
        for other in imported(tree)
        if floor(room(other)) > floor(room(module))
    ]
    assert upward == []


@pytest.mark.parametrize("rule", NEVER)
def test_the_house_keeps_its_rules(rule: str) -> None:
    lower, upper = (names.split() for names in NEVER[rule])
    broken = [
        f"{module} imports {other}"
        for module, tree in modules().items()
        if room(module) in lower
        for other in imported(tree)
        if room(other) in upper
    ]
    assert broken == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    state: dict[str, str] = {}

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert state.get(module) != "open", " -> ".join((*path[path.index(module) :], module))
        if module not in state:
            state[module] = "open"
            for other in imported(modules()[module]):
                if other in modules() and other != module:
                    visit(other, (*path, module))
            state[module] = "done"

    for module in modules():
        visit(module, ())


def test_files_classes_and_functions_stay_short() -> None:
    long = []
    for module, tree in modules().items():
        nodes = [(node, 250) for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        nodes += [(n, 60) for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]  # type: ignore[misc]
        long += [f"{module}.{n.name}" for n, most in nodes if (n.end_lineno or 0) - n.lineno >= most]
        long += [module] if max((node.end_lineno or 0 for node in tree.body), default=0) > 300 else []
    assert long == []
