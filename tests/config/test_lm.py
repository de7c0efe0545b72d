"""A recipe's quantization: the short form, its options, and runs of before there were any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import mllm
from mllm.config import loading
from mllm.config.lm import LMSpec, QuantizeSpec
from mllm.config.messages import checked
from mllm.errors import MLLMError


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_a_word_is_short_for_a_mapping(kind: Any) -> None:
    assert checked(LMSpec, {"model": "x", "quantize": kind}).quantize == QuantizeSpec(kind=kind, double=True)


@pytest.mark.parametrize(
    "wrong", ["2bit", {"kind": "4bit", "typ": "fp4"}, {"type": "nf4"}, {"kind": "4bit", "compute": "int8"}]
)
def test_what_is_wrong_is_named(wrong: Any) -> None:
    with pytest.raises(MLLMError, match=r"quantize\.(kind|typ|compute)"):
        checked(LMSpec, {"model": "x", "quantize": wrong})


def test_an_interrupted_run_of_before_keeps_constants_that_are_not_quantized(tmp_path: Path, tiny_parts: Any) -> None:
    values = {
        "name": "old",
        "encoder": {"model": tiny_parts[0]},
        "lm": {"model": tiny_parts[1], "quantize": "4bit"},
        "connector": {"type": "linear"},
        "stages": [{"name": "one", "train": ["connector"], "steps": 1}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    recipe = loading.load(str(tmp_path / "recipe.yaml"))
    run = yaml.safe_load(loading.dump(recipe))
    assert run["lm"]["quantize"]["double"] is True
    for stage in (run, *run["stages"]):
        stage["lm"]["quantize"] = "4bit"  # as it was written before there were options
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    continued = loading.continued(recipe, tmp_path / "run.yaml")
    assert [stage.lm.quantize.double for stage in (continued, *continued.stages)] == [False, False]  # type: ignore[union-attr]
    assert loading.continued(recipe, tmp_path / "recipe.yaml").lm.quantize.double is False  # type: ignore[union-attr]


def test_a_model_saved_before_keeps_constants_that_are_not_quantized(tmp_path: Path, tiny_parts: Any) -> None:
    lm = {"model": tiny_parts[1], "quantize": {"kind": "4bit", "double": False}}
    folder = mllm.assemble(tiny_parts[0], lm).save(tmp_path / "model")
    about = folder / "assembly.json"
    text = about.read_text()
    saved = json.loads(text)
    saved["spec"]["lm"]["quantize"] = "4bit"
    about.write_text(json.dumps(saved))
    loaded = mllm.load(folder).spec.lm
    assert loaded is not None and loaded.quantize == QuantizeSpec(kind="4bit", double=False)
