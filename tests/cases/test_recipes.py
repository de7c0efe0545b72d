"""Recipes as people write them in YAML, where off and on are booleans."""

from __future__ import annotations

import pytest

from mllm.config.loading import load
from mllm.errors import MLLMError


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("auto", "auto"),
        *(
            pytest.param(
                value,
                value,
                marks=pytest.mark.xfail(
                    strict=True,
                    raises=MLLMError,
                    reason="Right with the parts that people bring: off and on, which YAML reads as booleans",
                ),
            )
            for value in ("off", "on")
        ),
    ],
)
@pytest.mark.parametrize("given", ["in the recipe", "as an override"])
def test_the_cache_is_switched_as_the_documentation_says(tiny_parts, tmp_path, written, read, given):
    in_recipe = f"cache: {written}" if given == "in the recipe" else ""
    overrides = [f"cache={written}"] if given == "as an override" else []
    (tmp_path / "recipe.yaml").write_text(
        f"name: r\nencoder: {{model: {tiny_parts[0]}}}\nlm: {{model: {tiny_parts[1]}}}\n"
        f"connector: {{type: linear}}\n{in_recipe}\nstages: []\n"
    )
    assert load(str(tmp_path / "recipe.yaml"), overrides).cache == read
