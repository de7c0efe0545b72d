"""Recipes as people write them in YAML, where off and on are booleans, and a list may be null."""

from __future__ import annotations

from pathlib import Path

import pytest

from mllm.config.loading import dump, load
from mllm.errors import MLLMError


@pytest.fixture
def recipe(tiny_parts, tmp_path):
    """Return a function that writes a recipe with further lines, and returns its path."""

    def written(*lines: str) -> str:
        parts = [f"encoder: {{model: {tiny_parts[0]}}}", f"lm: {{model: {tiny_parts[1]}}}", "connector: {type: linear}"]
        (tmp_path / "recipe.yaml").write_text("\n".join(["name: r", *parts, *lines, "stages: []"]) + "\n")
        return str(tmp_path / "recipe.yaml")

    return written


@pytest.mark.parametrize(
    ("written", "read"),
    [("auto", "auto"), *((word, word.lower()) for word in ("off", "on", "Off", "ON")), ("no", "off"), ("yes", "on")],
)
@pytest.mark.parametrize("given", ["in the recipe", "as an override"])
def test_the_cache_is_switched_as_the_documentation_says(recipe, tmp_path, written, read, given):
    path = recipe(f"cache: {written}") if given == "in the recipe" else recipe()
    config = load(path, [f"cache={written}"] if given == "as an override" else [])
    assert config.cache.mode == read
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(str(tmp_path / "again.yaml")) == config


ALL = {"mode": "on", "dtype": "bfloat16", "limit": 3 * 2**30, "memory": 2**28}


@pytest.mark.parametrize(
    ("lines", "overrides"),
    [
        (["cache: {mode: on, dtype: bfloat16, limit: 3GiB, memory: 256MiB}"], []),
        (["cache: on"], ["cache.dtype=bfloat16", "cache.limit=3GiB", "cache.memory=256MiB"]),
        (["cache: {dtype: bfloat16, limit: 3GiB, memory: 256MiB}"], ["cache=on"]),
        (["cache: off"], ["cache=on", "cache.dtype=bfloat16", "cache.limit=3GiB", "cache.memory=256MiB"]),
        (["cache: on"], ["stages.0.cache.dtype=bfloat16", "stages.0.cache.limit=3GiB", "stages.0.cache.memory=256MiB"]),
        (["cache: {limit: 3GiB, dtype: bfloat16}"], ["stages.0.cache=on", "stages.0.cache.memory=256MiB"]),
    ],
)
def test_the_settings_of_the_cache_leave_each_other_as_they_are(recipe, tmp_path, lines, overrides):
    path = recipe(*lines)
    Path(path).write_text(Path(path).read_text().replace("[]", "[{name: a, train: [connector], steps: 1}]"))
    (stage,) = load(path, overrides).stages
    assert stage.cache.model_dump() == ALL
    (tmp_path / "over.yaml").write_text("extends: recipe.yaml\ncache: {limit: 5GiB}\nname: over\n")
    (over,) = load(str(tmp_path / "over.yaml"), overrides).stages
    assert (over.cache.limit == 5 * 2**30) is not any("limit" in text for text in overrides)
    again = tmp_path / "again.yaml"
    again.write_text(dump(load(path, overrides)))
    assert load(str(again)) == load(path, overrides)


@pytest.mark.parametrize(
    "written", ["{mode: 3}", "{limit: much}", "{memory: 1KiB}", "{dtype: int8}", "3", "{size: 1GiB}"]
)
def test_wrong_settings_of_the_cache_are_named(recipe, written):
    with pytest.raises(MLLMError, match="cache"):
        load(recipe(f"cache: {written}"))


@pytest.mark.parametrize("key", ["adapters", "heads", "tokens", "track"])
def test_null_is_an_empty_list(recipe, key):
    for config in (load(recipe(f"{key}: null")), load(recipe(f"{key}:")), load(recipe(), [f"{key}=null"])):
        assert getattr(config, key) == []


@pytest.mark.parametrize("key", ["adapters", "heads"])
def test_one_part_is_a_list_of_one(recipe, key):
    kind = {"adapters": "lora", "heads": "retrieval"}[key]
    (part,) = getattr(load(recipe(f"{key}: {{type: {kind}}}")), key)
    assert part.type == kind


@pytest.mark.parametrize("line", ["about: on", "tokens: [no]", "prompt: {caption: yes}", "about: 1e5"])
def test_a_word_that_yaml_reads_as_something_else_is_to_be_quoted(recipe, line):
    with pytest.raises(MLLMError, match="in quotes"):
        load(recipe(line))
