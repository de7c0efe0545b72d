"""Every full recipe has the settings that its paper publishes, says which are ours, and names its suites."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mllm.config import loading

FACTS: dict[str, list[dict[str, Any]]] = yaml.safe_load((Path(__file__).parent / "published.yaml").read_text())
ROWS = [pytest.param(name, row, id=f"{name}-{row['setting']}") for name, rows in FACTS.items() for row in rows]
FULL = [name for name in loading.names() if "-cpu" not in name and not name.startswith(("emoji-", "demo"))]


def value_at(name: str, key: str) -> Any:
    """Return the value of a resolved recipe at a dotted key; a dot inside a key is escaped."""
    value: Any = loading.load(name).model_dump(mode="json", by_alias=True)
    for step in re.split(r"(?<!\\)\.", key):
        value = value[int(step)] if isinstance(value, list) else value[step.replace("\\.", ".")]
    return value


def lines_of(name: str) -> list[str]:
    """Return the lines of a recipe's file, and of those that it extends."""
    lines = loading.find(name).read_text().splitlines()
    base = next((line.removeprefix("extends: ") for line in lines if line.startswith("extends: ")), None)
    return lines + (lines_of(base) if base else [])


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_a_recipe_has_the_published_setting_or_says_why_not(name: str, row: dict[str, Any]) -> None:
    if row.get("absent"):
        assert row["why"]
        return
    value = value_at(name, row["key"])
    if "contains" in row:
        assert [entry for entry in row["contains"] if entry not in value] == []
    elif "ours" in row:
        assert value == row["ours"] and "published" not in row
        leaf = re.split(r"(?<!\\)\.", row["key"])[-1].replace("\\.", ".")
        assert any(re.search(rf"\b{re.escape(leaf)}: .*# ours", line) for line in lines_of(name)), leaf
    else:
        assert row["source"].partition(",")[0] in ("code", "paper", "unchecked")
        assert value == row.get("recipe", row["published"])
        assert ("recipe" in row) == ("why" in row)


def test_every_full_recipe_has_facts_and_suites() -> None:
    assert sorted(FACTS) == sorted(FULL)
    assert [name for name in FULL if not loading.load(name).eval.suites] == []
