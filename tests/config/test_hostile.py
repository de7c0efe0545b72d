"""Recipes, overrides and suites that were damaged, made by mistake or made to harm: one message, and nothing hangs."""

from __future__ import annotations

import os
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from mllm.config.loading import load
from mllm.config.yaml_text import DEPTH, parse_yaml, resolved
from mllm.errors import MLLMError
from mllm.planning.check import problems

load_suite: Any = import_module("mllm.eval.suite").load_suite

RECIPE = "name: r\nencoder: {{model: {0}}}\nlm: {{model: {1}}}\nconnector: {{type: linear}}\nstages: []\n"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
TEXTS = {
    "brackets": "[" * 100_000,
    "braces": "{a: " * 100_000,
    "fewer brackets": "[" * 2_000,
    "closed brackets": "name: " + "[" * 2_000 + "]" * 2_000,
    "deep blocks": "- " * 3_000 + "a",
    "recursion": "name: &x [*x]",
    "an alias bomb": BOMB,
    "hexadecimal without digits": "seed: 0x_",
    "binary without digits": "seed: 0b_",
    "5,000 digits": "seed: " + "9" * 5_000,
    "65 bits": "seed: 36893488147419103232",
    "a tag that does not fit": "seed: !!int x",
    "a tag that runs code": "name: !!python/object/apply:os.system ['true']",
    "a time that is none": "seed: !!timestamp x",
    "binary data": "name: !!binary x",
    "null as a key": "null: a",
    "a list as a key": "? [a]\n: b",
    "a key twice": "name: a\nname: b",
    "control characters": "name: \x00",
    "an open interpolation": "name: ${b",
    "nested interpolations": "name: " + "${a" * 2_000,
    "an unknown alias": "name: *b",
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.timeout(60)
def test_text_that_is_no_recipe_is_one_short_message(file: Path, kind: str) -> None:
    file.write_text(TEXTS[kind])
    for read in (load, load_suite):
        with pytest.raises(MLLMError) as caught:
            read(str(file))
        assert len(str(caught.value)) < 2_000


@pytest.mark.parametrize("kind", [kind for kind in TEXTS if "\n" not in TEXTS[kind] and ": " in TEXTS[kind]])
@pytest.mark.timeout(60)
def test_an_override_is_text_or_one_message(tiny_parts, file: Path, kind: str) -> None:
    file.write_text(RECIPE.format(*tiny_parts))
    key, _, value = TEXTS[kind].partition(": ")
    with pytest.raises(MLLMError):
        load(str(file), [f"{'seed' if key == 'name' else key}={value}"])


def test_the_depth_is_counted_and_not_the_brackets() -> None:
    assert parse_yaml("a: " + "[" * (DEPTH - 1) + "]" * (DEPTH - 1), "it")
    assert parse_yaml("\n".join(f"k{i}: [a]" for i in range(10 * DEPTH)), "it")
    with pytest.raises(MLLMError, match="nested deeper"):
        parse_yaml("a: " + "[" * DEPTH + "]" * DEPTH, "it")


def test_extends(tmp_path: Path, tiny_parts) -> None:
    for number in range(1_200):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\nname: a\n")
    for value, message in ((tmp_path / "0.yaml", "more than 32 files"), ("${a}", "No recipe is called")):
        (tmp_path / "top.yaml").write_text(f"extends: {value}\nname: a\n")
        with pytest.raises(MLLMError, match=message):
            load(str(tmp_path / "top.yaml"))


@pytest.mark.parametrize(
    "content", ["secret: hunter2\n", "hunter2\n", "key: [hunter2\n", "a: hunter2: b\n", "%hunter2"]
)
def test_a_file_that_is_no_recipe_is_not_quoted(tmp_path: Path, content: str) -> None:
    (tmp_path / "secret.yaml").write_text(content)
    (tmp_path / "top.yaml").write_text(f"extends: {tmp_path}/secret.yaml\nname: a\n")
    with pytest.raises(MLLMError) as caught:
        load(str(tmp_path / "top.yaml"))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "${oc.env:SECRET}",
        "a ${oc.env:SECRET,b}",
        "${oc.decode:${oc.env:SECRET}}",
        "${${about}:SECRET}",
        "${ oc.env:HOME}",
    ],
)
def test_the_environment_is_not_read(file: Path, tiny_parts, monkeypatch, text: str) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    for content, overrides in ((f"about: oc.env\npaper: '{text}'\n", []), ("", [f"paper={text}"])):
        file.write_text(RECIPE.format(*tiny_parts) + content)
        with pytest.raises(MLLMError) as caught:
            load(str(file), overrides)
        assert "hunter2" not in str(caught.value)


def test_a_key_of_the_recipe_is_still_referred_to() -> None:
    values = {"a": {"b": "x"}, "c": "${a.b} and ${a[b]}", "d": "at 10:30 {e:f}"}
    assert resolved(values, "it") == {"a": {"b": "x"}, "c": "x and x", "d": "at 10:30 {e:f}"}


@pytest.mark.parametrize(
    "name", ["../../x", "/abs", "a/b", "..", ".", "", "a\\b", "a\x00", "a\nb", "x" * 256, "ü" * 101]
)
def test_a_name_is_one_file_inside_its_folder(file: Path, tiny_parts, name: str) -> None:
    file.write_text(RECIPE.format(*tiny_parts))
    for key in ("name", "stages"):
        value = name if key == "name" else [{"name": name, "train": ["connector"], "steps": 1}]
        with pytest.raises(MLLMError, match=r"name"):
            load(str(file), {key: value})
    assert load(str(file), {"name": "a run, of müller's"}).name == "a run, of müller's"


def test_long_paths_and_pipes_are_one_message(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    began = time.monotonic()
    for name in ("x" * 300 + ".yaml", "x" * 300, "x" * 5_000 + "/a.yaml", "a\x00.yaml", str(tmp_path / "pipe.yaml")):
        for read in (load, load_suite):
            with pytest.raises(MLLMError):
                read(name)
    assert time.monotonic() - began < 5


OUT_OF_RANGE: dict[str, list[Any]] = {
    "seed": [-1, 2**32, 2**64],
    "stages.0.seed": [-1, 2**32],
    "optim.betas": [[1.5, 0.9], [0.9, -0.1], [1, 1]],
    "optim.weight_decay": [-1],
    "optim.clip": [0, -1],
    "optim.warmup": [-1],
    "connector.dropout": [2, -0.1, 1],
    "connector.tokens": [-1, 0, 2.5],
    "stages.0.train.connector": [-1],
    "stages.0.objectives.0.weight": [-1, float("nan"), float("inf")],
    "adapters.0.r": ["x", 0, -4],
    "adapters.0.dropout": [7],
    "adapters": [[{"type": "lora"}, {"type": "lora"}]],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in OUT_OF_RANGE.items() for value in values])
def test_check_finds_what_is_out_of_range(file: Path, tiny_parts, key: str, value: object) -> None:
    stage = "{name: s, train: {connector: 0.1}, steps: 1, objectives: [{type: caption, weight: 1}]}"
    content = (
        RECIPE.format(*tiny_parts).replace("stages: []", f"stages: [{stage}]") + "adapters: [{type: lora, r: 2}]\n"
    )
    file.write_text(content + f"data: {{train: {{format: table, path: {file}}}}}\n")
    assert problems(str(file)) == []
    (problem,) = problems(str(file), {key: value})
    assert key.rpartition(".")[2] in problem or "given twice" in problem


@pytest.mark.parametrize("values", [{"decoding": {"x": float("inf")}}, {"decoding": {"caption": {"x": float("nan")}}}])
def test_numbers_that_json_cannot_keep_are_refused(file: Path, tiny_parts, values: dict[str, Any]) -> None:
    file.write_text(RECIPE.format(*tiny_parts))
    with pytest.raises(MLLMError, match="finite"):
        load(str(file), values)


def test_a_list_of_what_trains_has_names_only(file: Path, tiny_parts) -> None:
    file.write_text(RECIPE.format(*tiny_parts))
    with pytest.raises(MLLMError, match="expected the paths of parts"):
        load(str(file), {"stages": [{"name": "s", "train": ["connector", []], "steps": 1}]})


def test_a_readers_arguments_have_the_types_of_its_annotations(file: Path, tiny_parts) -> None:
    file.write_text(
        RECIPE.format(*tiny_parts).replace("stages: []", "stages: [{name: s, train: [connector], steps: 1}]")
    )
    paths: tuple[Any, ...] = (3, True, None, [], {"a": 1})
    for path in paths:
        wrong = problems(str(file), {"data": {"train": {"format": "table", "path": path}}})
        assert any(f"'table' has path={path!r}" in problem for problem in wrong), wrong
