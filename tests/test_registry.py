"""The registry: exact names, former names, lazy targets, and other packages' parts by the same lookup."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mllm import registry
from mllm.builtin import BUILT_IN, RENAMED
from mllm.config.data import DataSpec
from mllm.errors import MLLMError

GROUPS = "encoders lms engines connectors adapters heads image_decoders scorers guides rewards objectives fits "
GROUPS += "readers decoding answers suites metrics"
PARTS = [(group, name) for group, parts in BUILT_IN.items() for name in parts]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Return a function that installs a distribution with entry points."""

    def install(name: str, points: str) -> None:
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(points)
        registry.table.cache_clear()

    (tmp_path / "their_parts.py").write_text("class Theirs:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield install
    registry.table.cache_clear()
    sys.modules.pop("their_parts", None)


def test_groups_are_those_of_the_design() -> None:
    assert list(BUILT_IN) == GROUPS.split()


@pytest.mark.parametrize(("group", "name"), PARTS)
def test_built_in_part_imports(group: str, name: str) -> None:
    assert callable(registry.lookup(group, name))


@pytest.mark.parametrize("name", BUILT_IN["readers"])
def test_no_key_of_a_source_hides_an_argument_of_its_reader(name: str) -> None:
    assert not inspect.signature(registry.lookup("readers", name)).parameters.keys() & DataSpec.model_fields.keys()


def test_there_are_built_in_parts_to_look_up() -> None:
    assert {("connectors", "linear"), ("readers", "coco-captions"), ("objectives", "caption")} <= set(PARTS)


def test_unknown_name_lists_the_near_match() -> None:
    with pytest.raises(MLLMError, match=r"'liner' in mllm.connectors. Did you mean 'linear'\?"):
        registry.lookup("connectors", "liner")
    with pytest.raises(MLLMError, match=r"No part called 'Linear'"):  # names are exact
        registry.lookup("connectors", "Linear")
    with pytest.raises(MLLMError, match=r"'zzz' in mllm.readers. Known: activitynet-qa, aokvqa, caption-folder, "):
        registry.lookup("readers", "zzz")


def test_another_packages_part_is_found(install: Callable[[str, str], None]) -> None:
    with pytest.raises(MLLMError):
        registry.lookup("connectors", "theirs")
    install("their", "[mllm.connectors]\ntheirs = their_parts:Theirs\n")
    assert registry.lookup("connectors", "theirs").__name__ == "Theirs"
    assert "linear" in registry.table("connectors"), "built-in parts stay"
    assert "theirs" not in registry.table("readers")


@pytest.mark.parametrize("name", ["linear", "theirs"])
def test_one_name_for_two_parts_raises(install: Callable[[str, str], None], name: str) -> None:
    install("one", "[mllm.connectors]\ntheirs = their_parts:Theirs\n")
    install("two", f"[mllm.connectors]\n{name} = other_parts:Other\n")
    with pytest.raises(MLLMError, match=rf"Two parts are called '{name}' in mllm.connectors: .*other_parts:Other"):
        registry.lookup("connectors", "linear")


@pytest.mark.parametrize("target", ["other_parts:Other", BUILT_IN["objectives"]["token-suppression"]])
def test_a_former_name_cannot_be_registered(install: Callable[[str, str], None], target: str) -> None:
    install("one", f"[mllm.objectives]\nsilence = {target}\n")
    with pytest.raises(MLLMError, match=rf"Two parts are called 'silence' in mllm.objectives: .* and {target}"):
        registry.lookup("objectives", "caption")


@pytest.mark.parametrize(("group", "old"), [(group, old) for group, names in RENAMED.items() for old in names])
def test_a_former_name_is_not_listed(group: str, old: str) -> None:
    assert old not in registry.table(group) and RENAMED[group][old] in registry.table(group)
    with pytest.raises(MLLMError) as error:
        registry.lookup(group, f"{old}s")
    assert repr(old) not in str(error.value)


def test_one_part_listed_twice_is_one_part(install: Callable[[str, str], None]) -> None:
    install("one", "[mllm.connectors]\ntheirs = their_parts:Theirs\n")
    install("two", "[mllm.connectors]\ntheirs = their_parts:Theirs\n")
    assert registry.lookup("connectors", "theirs").__name__ == "Theirs"


@pytest.mark.parametrize("target", ["not_there:Part", "their_parts:NotThere"])
def test_another_packages_broken_part_is_one_message(install: Callable[[str, str], None], target: str) -> None:
    install("broken", f"[mllm.connectors]\nbroken = {target}\n")
    with pytest.raises(MLLMError, match=rf"'broken' of mllm.connectors is {target}.*cannot be imported"):
        registry.lookup("connectors", "broken")
    assert registry.lookup("connectors", "linear")
