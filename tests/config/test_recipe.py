"""Recipes: what is written is what is meant, and everything wrong in one is said at once, by key and value."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mllm.config import loading as recipe
from mllm.config import recipe as spec
from mllm.config.parts import AssemblySpec
from mllm.errors import MLLMError

TEXT = """
name: base
encoder: {model: some/encoder, layer: -2}
lm: {model: some/lm}
connector: {type: linear, tokens: 4}
data:
  train: {format: table, path: train.csv}
optim: {warmup: 7, schedule: linear}
stages:
  - {name: fit, fit: {part: connector}}
  - {name: align, train: {connector: 5.0e-4}, steps: 20, optim: {warmup: 3}, encoder: {resolution: 64}}
"""
SHIPPED = recipe.names()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(TEXT)
    return path


def load(file: Path, *overrides: str) -> spec.Recipe:
    return recipe.load(str(file), overrides)


def problems(file: Path, *overrides: str) -> list[str]:
    """The lines of the error, without its first, which names the recipe."""
    with pytest.raises(MLLMError) as caught:
        load(file, *overrides)
    first, *lines = str(caught.value).splitlines()
    assert str(file) in first
    return [line.strip() for line in lines]


def test_recipes_are_shipped() -> None:
    assert "limber-cpu" in SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_parses_and_is_called_as_its_file(name: str) -> None:
    config = recipe.load(name)
    assert config.name == name
    assert config.about and config.stages


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_is_a_script(name: str) -> None:
    path = recipe.find(name)
    assert path.read_text().splitlines()[0] == "#!/usr/bin/env -S mllm train"
    assert os.access(path, os.X_OK), f"chmod +x {path.name}"


@pytest.mark.parametrize("name", SHIPPED)
def test_dumped_recipe_loads_back_equal(name: str, tmp_path: Path) -> None:
    config = recipe.load(name)
    (tmp_path / "dumped.yaml").write_text(recipe.dump(config))
    assert recipe.load(str(tmp_path / "dumped.yaml")) == config


def test_dump_keeps_what_overrides_and_stages_set(file: Path, tmp_path: Path) -> None:
    config = load(file, "connector.tokens=null", "init.parts=[connector]", "prompt.question=Q: {question}\nA:")
    assert config.connector is not None and config.connector.options() == {"tokens": None}
    (tmp_path / "dumped.yaml").write_text(recipe.dump(config))
    again = recipe.load(str(tmp_path / "dumped.yaml"))
    assert again == config
    assert again != load(file)


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("stages.1.steps=50", lambda c: c.stages[1].steps, 50),
        ("stages.1.train.connector=1e-3", lambda c: c.stages[1].train, {"connector": 0.001}),
        ("stages.1.train=[connector]", lambda c: c.stages[1].train, {"connector": 2.0e-4}),
        ("optim.betas=[0.8, 0.99]", lambda c: c.stages[1].optim.betas, (0.8, 0.99)),
        ("optim.clip=null", lambda c: c.stages[1].optim.clip, None),
        ("encoder.layer=", lambda c: c.stages[0].encoder.layer, None),
        ("connector.type=mlp", lambda c: c.stages[1].connector.type, "mlp"),
        ("connector.hidden=12", lambda c: c.stages[1].connector.options(), {"tokens": 4, "hidden": 12}),
        ("prompt.caption=It shows a", lambda c: c.prompt.caption, "It shows a"),
        ("prompt.question=Q: {question} A:", lambda c: c.stages[1].prompt.question, "Q: {question} A:"),
        ("decoding.stop_strings=[a, b]", lambda c: c.stages[1].decoding.get("stop_strings"), ["a", "b"]),
        ("data.val={format: table, path: v.csv}", lambda c: [s.format for s in c.stages[0].data.val], ["table"]),
        ("data.train.path=a=b.csv", lambda c: c.data.train[0].options(), {"path": "a=b.csv"}),
        ("encoder.resolution=${optim.warmup}", lambda c: c.encoder.resolution, 7),
    ],
)
def test_dotted_override(file: Path, override: str, read: Any, expected: Any) -> None:
    assert read(load(file)) != expected
    assert read(load(file, override)) == expected


def test_overrides_as_a_mapping_and_in_order(file: Path) -> None:
    config = recipe.load(str(file), {"connector.type": "mlp", "stages.1.steps": 5, "connector": {"type": "x"}})
    assert config.connector is not None and config.connector.model_dump() == {"type": "x"}
    assert config.stages[1].steps == 5


def test_stage_overrides_by_deep_merge_and_only_itself(file: Path) -> None:
    fit, align = load(file).stages
    assert (fit.optim.warmup, align.optim.warmup) == (7, 3)
    assert align.optim.schedule == "linear", "the rest of the mapping stays"
    assert fit.encoder is not None and align.encoder is not None
    assert (align.encoder.model, align.encoder.layer, align.encoder.resolution) == ("some/encoder", -2, 64)
    assert fit.encoder.resolution is None


def test_a_stages_model_holds_what_earlier_stages_trained_and_drew(file: Path) -> None:
    one = "{name: one, train: {encoder: 1.0e-4, connector: 1.0e-3}, steps: 1}"
    two = "{name: two, seed: 5, train: {lm.model.norm: 1.0e-4}, steps: 1, lm: {dtype: bfloat16}}"
    three = "{name: three, seed: 6, train: {connector: 1.0e-3}, steps: 1, encoder: {model: another}}"
    stages = load(file, f"stages=[{one}, {two}, {three}]", "seed=2").stages
    assert [stage.assembly.trained for stage in stages] == [
        ["encoder"], ["encoder", "lm.model.norm"], ["encoder", "lm.model.norm"]
    ]  # fmt: skip
    assert [stage.assembly.seed for stage in stages] == [2, 5, 6]
    # Another precision has the same weights, another model has not.
    assert [stage.assembly.seeds for stage in stages] == [{}, {"encoder": 2, "lm": 2}, {"lm": 2}]
    changed = stages[1].model_copy(update={"decoding": {"max_new_tokens": 3}})
    assert changed.assembly == stages[1].assembly.model_copy(update={"decoding": {"max_new_tokens": 3}})


def test_a_stage_knows_which_parts_it_trains_or_sets(file: Path) -> None:
    fit, align = load(file).stages
    assert [stage.trains("connector") for stage in (fit, align)] == [False, True]
    assert [stage.sets("connector") for stage in (fit, align)] == [True, True]
    (stage,) = load(file, "stages=[{name: s, train: {lm.model.layers.1: 1.0e-4}, steps: 1}]").stages
    assert stage.trains("lm") and not stage.trains("lm.model") and not stage.sets("connector")
    (stage,) = load(file, "init.from=run", "stages=[{name: s, train: {lm: 1.0e-4}, steps: 1}]").stages
    assert stage.sets("connector") and not stage.trains("connector")
    (stage,) = load(file, "init={from: run, parts: [heads.x]}", "stages=[{name: s, train: [lm], steps: 1}]").stages
    assert stage.sets("heads") and not stage.sets("connector")


def test_extends_takes_the_rest_from_another_recipe(file: Path, tmp_path: Path) -> None:
    (tmp_path / "middle.yaml").write_text("extends: base.yaml\nname: middle\nconnector: {tokens: 9}\n")
    (tmp_path / "last.yaml").write_text("extends: middle.yaml\nname: last\noptim: {warmup: 1}\n")
    config = load(tmp_path / "last.yaml", "seed=3")
    assert config.connector is not None
    assert (config.name, config.optim.warmup, config.seed) == ("last", 1, 3)
    assert (config.connector.type, config.connector.options()) == ("linear", {"tokens": 9})
    assert [stage.name for stage in config.stages] == ["fit", "align"]


def test_another_part_or_reader_brings_its_own_options(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "extends: limber-cpu\nname: mine\nconnector: {type: mlp, depth: 3}\n"
        "stages: [{name: s, train: [connector], steps: 1, data: {val: {format: table, path: x.csv}}}]\n"
    )
    config = load(tmp_path / "mine.yaml")
    assert config.connector is not None and config.connector.options() == {"depth": 3}
    assert config.stages[0].data.val[0].options() == {"path": "x.csv"}
    (tmp_path / "less.yaml").write_text("extends: limber-cpu\nname: less\nconnector: {tokens: 1}\n")
    config = load(tmp_path / "less.yaml")
    assert config.connector is not None and (config.connector.type, config.connector.options()) == (
        "linear",
        {"tokens": 1},
    )


def test_extends_finds_shipped_recipes(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: limber-cpu\nname: mine\nseed: 5\n")
    config = load(tmp_path / "mine.yaml")
    assert (config.name, config.seed) == ("mine", 5)
    assert config.encoder == recipe.load("limber-cpu").encoder


def test_extends_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: here/b.yaml\nname: a\n")
    (tmp_path / "here").symlink_to(tmp_path)
    (tmp_path / "b.yaml").write_text("extends: a.yaml\nname: b\n")
    with pytest.raises(MLLMError, match="'extends' goes in a circle: a -> b -> a"):
        load(tmp_path / "a.yaml")
    for value, message in (
        ("limber-cpuu", "Did you mean 'limber-cpu'"),
        ("c.yaml", "no recipe file"),
        ("[a]", "extends"),
    ):
        (tmp_path / "a.yaml").write_text(f"extends: {value}\nname: a\n")
        with pytest.raises(MLLMError, match=message):
            load(tmp_path / "a.yaml")


def test_unknown_keys_name_the_near_match_once(file: Path) -> None:
    assert problems(file, "optim.warmpu=3") == ["optim.warmpu: unknown key. Did you mean 'warmup' or 'warmup_start'?"]
    (line,) = problems(file, "conector.type=linear")
    assert line.startswith("conector: unknown key. Did you mean 'connector'")
    (line,) = problems(file, "stages.1.stps=3")
    assert line.startswith("stages.1.stps: unknown key. Did you mean 'steps'")
    (line,) = problems(file, "stages.1.fit.solvr=ridge", "stages.1.fit.part=connector")
    assert line.startswith("stages.1.fit.solvr: unknown key. Did you mean 'solver'")
    (line,) = problems(file, "init.form=run")
    assert line.startswith("init.form: unknown key. Did you mean 'from'")


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("encoder.layer=top", "encoder.layer", "'top'"),
        ("encoder.select=patch", "encoder.select", "'patch'"),
        ("encoder.model=", "encoder.model", "None"),
        ("encoder.model=''", "encoder.model", "''"),
        ("lm.quantize=2bit", "lm.quantize.kind", "'2bit'"),
        ("optim.accumulate=0", "optim.accumulate", "0"),
        ("stages.1.steps=1.5", "stages.1.steps", "1.5"),
        ("stages.1.steps=-1", "stages.1.steps", "-1"),
        ("stages.1.train.connector=fast", "stages.1.train.connector", "'fast'"),
        ("stages.1.train.connector=.nan", "stages.1.train.connector", "nan"),
        ("stages.1.batch_size=[1, 2", "stages.1.batch_size", "'[1, 2'"),
        ("data.train={format: table, weight: 0}", "data.train.0.weight", "0"),
        ("prompt.question=What is it?", "prompt.question", "'What is it?'"),
        ("prompt.question=Q {question.__class__}", "prompt.question", "'Q {question.__class__}'"),
        ("stages=[fit]", "stages.0", "'fit'"),
        ("stages=3", "stages", "3"),
        ("seed=1.5", "seed", "1.5"),
    ],
)
def test_wrong_values_are_named_once(file: Path, override: str, key: str, value: str) -> None:
    (line,) = problems(file, override)
    assert line.startswith(f"{key}: {value}: ")


def test_all_problems_are_said_at_once(file: Path) -> None:
    lines = problems(file, "encoder.layer=top", "lm.modl=x", "stages.0.fit.solver=sgd", "data.train={path: x}")
    assert {line.split(":")[0] for line in lines} == {
        "encoder.layer",
        "lm.modl",
        "stages.0.fit.solver",
        "data.train.0.format",
    }


def test_a_stage_either_fits_or_trains(file: Path) -> None:
    either = "stages.1: a stage has either 'fit' or 'train': give one of the two"
    assert problems(file, "stages.1.fit.part=connector") == [either]
    assert problems(file, "stages.1.train={}") == [either]
    one = "stages.1: a stage that trains needs 'steps' or 'epochs': give one of the two"
    assert problems(file, "stages.1.steps=null") == problems(file, "stages.1.epochs=2") == [one]


def test_overrides_that_fit_nowhere(file: Path) -> None:
    for override, message in (
        ("stages", "not of the form key=value"),
        ("=3", "not of the form key=value"),
        ("stages.7.steps=3", r"stages.7.steps=3 does not fit"),
        ("stages.first.steps=3", r"stages.first.steps=3 does not fit"),
        ("seed=${nothing}", "nothing"),
    ):
        with pytest.raises(MLLMError, match=message) as caught:
            load(file, override)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "name: missing"),
        (b"encoder: [", "not a YAML file"),
        (b"name: a\nname: b\n", "not a YAML file"),
        (b"- a list\n", "is no recipe"),
        (b"just words", "is no recipe"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(MLLMError, match=message):
        load(tmp_path / "bad.yaml")


def test_names_of_recipes_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(MLLMError, match=r"No recipe is called 'limbercpu'. Did you mean 'limber-cpu'"):
        recipe.load("limbercpu")
    for name in (str(tmp_path / "none.yaml"), str(tmp_path), "none.yml"):
        with pytest.raises(MLLMError, match="There is no recipe file"):
            recipe.load(name)


def test_a_heads_default_name_is_not_written() -> None:
    def written(**head: Any) -> Any:
        spec = AssemblySpec.model_validate({"heads": [{"type": "retrieval", "dim": 6, **head}]})
        assert AssemblySpec.model_validate_json(spec.model_dump_json()) == spec
        return spec.model_dump()["heads"]

    assert written() == written(name="retrieval") == [{"type": "retrieval", "dim": 6}]
    assert written(name="second") == [{"type": "retrieval", "dim": 6, "name": "second"}]
