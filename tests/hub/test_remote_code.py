"""Code of a model's repository is run only where the part's specification allows it, and nothing is asked on stdin.

Each folder has planted code that leaves a file behind when it is run.
"""

from __future__ import annotations

import ast
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

import mllm
from mllm.config.loading import load as load_recipe
from mllm.errors import MLLMError
from mllm.planning.check import problems
from mllm.testing import tiny_image

ROOT = Path(__file__).parent.parent.parent
PLANTED = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import {base}Config, {base}Model, {base}ForCausalLM, PreTrainedTokenizerFast

class PlantedConfig({base}Config):
    model_type = "planted"

class PlantedModel({base}Model):
    config_class = PlantedConfig

class PlantedLM({base}ForCausalLM):
    config_class = PlantedConfig

class PlantedTokenizer(PreTrainedTokenizerFast):
    pass
"""


def planted(source: str, target: Path, base: str, mark: Path) -> str:
    """Copy a model's folder, with a model type that only the code in the folder knows."""
    shutil.copytree(source, target)
    code = PLANTED.format(mark=str(mark), base=base)
    if base == "ViT":
        code = code.replace(", ViTForCausalLM", "").partition("class PlantedLM")[0]
    (target / "planted.py").write_text(code)
    config = json.loads((target / "config.json").read_text())
    kinds = {"AutoConfig": "PlantedConfig", "AutoModel": "PlantedModel", "AutoModelForCausalLM": "PlantedLM"}
    config |= {"model_type": "planted", "auto_map": {auto: f"planted.{name}" for auto, name in kinds.items()}}
    (target / "config.json").write_text(json.dumps(config))
    return str(target)


@pytest.fixture
def mark(tmp_path) -> Path:
    return tmp_path / "code-was-run"


@pytest.fixture
def folders(tiny_parts, tmp_path, mark, monkeypatch) -> tuple[str, str]:
    """Return an encoder and a language model with code; whoever asks on stdin is told "y"."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    encoder = planted(tiny_parts[0], tmp_path / "encoder", "ViT", mark)
    return encoder, planted(tiny_parts[1], tmp_path / "lm", "Llama", mark)


def written(folder: Path, encoder: str, lm: str, allowed: str = "") -> str:
    for index in range(2):
        tiny_image(index).save(folder / f"{index}.png")
    rows = [{"image": f"{index}.png", "caption": "red"} for index in range(2)]
    (folder / "train.json").write_text(json.dumps(rows))
    models = {"encoder": encoder, "lm": lm}
    parts = {name: {"model": model, "trust_remote_code": name == allowed} for name, model in models.items()}
    data = {"train": {"format": "table", "path": str(folder / "train.json")}}
    stage = {"name": "one", "train": ["connector"], "steps": 1, "batch_size": 1}
    recipe = {"name": "code", **parts, "connector": {"type": "linear"}, "data": data, "stages": [stage]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return str(folder / "recipe.yaml")


@pytest.mark.parametrize("part", ["encoder", "lm"])
def test_code_is_not_run_and_not_asked_about(folders, tiny_parts, tmp_path, mark, part):
    encoder, lm = (folders[0], tiny_parts[1]) if part == "encoder" else (tiny_parts[0], folders[1])
    with pytest.raises(MLLMError, match="trust_remote_code: true for this part"):
        mllm.assemble(encoder, lm)
    recipe = written(tmp_path, encoder, lm)
    assert any("trust_remote_code: true" in problem for problem in problems(recipe))
    with pytest.raises(MLLMError, match="trust_remote_code"):
        mllm.train(recipe, out=tmp_path / "run")
    assert not mark.exists()
    assert sys.stdin.read() == "y\n" * 100, "something was read from stdin"


def test_a_tokenizers_code_is_not_run(tiny_parts, tmp_path, mark, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    folder = tmp_path / "lm"
    shutil.copytree(tiny_parts[1], folder)
    (folder / "planted.py").write_text(PLANTED.format(mark=str(mark), base="Llama"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "PlantedTokenizer"}
    config["auto_map"] = {"AutoTokenizer": [None, "planted.PlantedTokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(MLLMError, match="trust_remote_code"):
        mllm.assemble(tiny_parts[0], str(folder))
    assert not mark.exists() and sys.stdin.read() == "y\n" * 100


def test_code_is_run_for_the_part_that_allows_it_and_the_run_says_so(folders, tiny_parts, tmp_path, mark):
    recipe = written(tmp_path, tiny_parts[0], folders[1], "lm")
    run = mllm.train(recipe, out=tmp_path / "run")
    assert mark.exists()
    assert json.loads((run.path / "environment.json").read_text())["remote_code"] == f"lm: {folders[1]}"
    saved = json.loads((run.path / "model" / "assembly.json").read_text())["spec"]
    assert saved["lm"]["trust_remote_code"] and not saved["encoder"]["trust_remote_code"]
    mark.unlink()
    sys.modules.pop("planted", None)
    with pytest.raises(MLLMError, match=r"The lm of .* runs Python code.*--trust-remote-code lm"):
        mllm.load(run.path)  # a run may be somebody else's
    assert not mark.exists()
    assert len(mllm.load(run.path, trust_remote_code=["lm"]).generate([[tiny_image(0), "red"]])) == 1


def test_permission_for_one_part_is_none_for_another(folders, tmp_path, mark):
    with pytest.raises(MLLMError, match="encoder"):
        mllm.assemble(folders[0], {"model": folders[1], "trust_remote_code": True})
    assert not mark.exists()


def test_members_of_fused_encoders_are_named(tiny_parts):
    members = [{"model": tiny_parts[0]}, {"model": tiny_parts[0], "trust_remote_code": True}]
    spec = load_recipe("limber-cpu", {"encoder": {"fuse": "width", "of": members}})
    assert spec.remote_code() == {"encoder.of.1": tiny_parts[0]}


def test_every_call_of_the_package_says_whether_code_may_run():
    """The default of `transformers` is to ask on stdin, so the argument is never left out."""
    silent = []
    for folder in ("mllm", "adapters", "eval"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                call = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
                if call.endswith((".from_pretrained", ".from_config")) and "Scheduler" not in call:  # of diffusers
                    assert isinstance(node, ast.Call)
                    if "trust_remote_code" not in {keyword.arg for keyword in node.keywords}:
                        silent.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert silent == []
