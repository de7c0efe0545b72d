"""`mllm check`: everything wrong in a recipe is said at once, from configurations, before a weight is loaded."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from mllm import registry
from mllm.config import loading as recipe
from mllm.errors import MLLMError
from mllm.planning.check import problems
from mllm.planning.paper import meta_model
from mllm.slots import Connector
from mllm.testing import tiny_image, tiny_lm


class Loaded(BaseException):
    """A weight was loaded; nothing turns it into a message."""


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch, tiny_parts: tuple[str, str]) -> None:
    """From here on nothing may open a weight file."""

    def loaded(*_: Any, **__: Any) -> None:
        raise Loaded

    monkeypatch.setattr(torch, "load", loaded)
    monkeypatch.setattr(safetensors.torch, "load_file", loaded)
    monkeypatch.setattr(safetensors, "safe_open", loaded)
    monkeypatch.setattr("transformers.modeling_utils.safe_open", loaded)


@pytest.fixture
def file(tmp_path: Path, tiny_parts: tuple[str, str]) -> Path:
    tiny_image().save(tmp_path / "a.png")
    (tmp_path / "train.csv").write_text("image,caption\na.png,noise\n")
    path = tmp_path / "fine.yaml"
    path.write_text(f"""
name: fine
encoder: {{model: {tiny_parts[0]}}}
lm: {{model: {tiny_parts[1]}}}
connector: {{type: linear, tokens: 4}}
data: {{train: {{format: table, path: {tmp_path}/train.csv}}}}
stages:
  - {{name: fit, fit: {{part: connector}}}}
  - {{name: align, train: {{connector: 1.0e-3}}, steps: 2}}
""")
    return path


def test_the_guard_against_loading_works(tiny_parts: tuple[str, str]) -> None:
    import mllm

    with pytest.raises(Loaded):
        mllm.assemble(*tiny_parts)


@pytest.mark.installed
@pytest.mark.parametrize("name", recipe.names())
def test_shipped_recipe_checks_clean(name: str, need: Callable[..., None]) -> None:
    config = recipe.load(name)
    models = {spec.model for stage in config.stages for spec in (stage.encoder, stage.lm) if spec}
    need(*(model for model in models if model and model.startswith("mllm/")))
    ours = [
        problem
        for problem in problems(name)
        if not problem.endswith("there is no such file or folder.")  # a published system's data is the user's to bring
    ]
    assert ours == []


def test_recipe_on_folders_checks_clean(file: Path) -> None:
    assert problems(str(file)) == []


def test_parts_that_a_recipe_does_not_name_are_missed_by_what_needs_them(file: Path) -> None:
    (problem,) = problems(str(file), ["encoder=null"])
    assert problem == "The connector linear reads an encoder's features, and there is none: give encoder."
    found = problems(str(file), ["lm=null", "connector=null", "stages.0.train={}"])
    assert any("the objective 'caption' needs a language model" in problem for problem in found), found


def test_model_on_paper_has_shapes_and_no_weights(file: Path) -> None:
    config = recipe.load(str(file))
    model: Any = meta_model(config.stages[0])
    assert (model.connector.num_tokens, model.encoder.dim, model.lm.dim) == (4, 24, 32)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    config = recipe.load(str(file), ["lm.model=./nowhere"])
    with pytest.raises(MLLMError, match=r"no folder './nowhere'"):
        meta_model(config.stages[0])


BROKEN = [
    (["encoder.model=./nowhere"], "There is no folder './nowhere'"),
    (["encoder.model=mllm/mobilenet-v3"], "Did you mean 'mllm/mobilenet-v2'"),
    (["encoder.model=mllm/mobilenet-v2"], "Run `mllm parts install mllm/mobilenet-v2`"),
    (["encoder.model=mllm/smollm2-135m"], "one of the lms; expected one of the encoders"),
    (["encoder.model=nobody/nothing"], "'nobody/nothing' could not be loaded"),
    (["encoder.layer=99"], "encoder.layer is 99, but the encoder has 3 hidden states"),
    (["encoder.resolution=30"], "encoder.resolution is 30, but the encoder's patches are 8 pixels wide"),
    (["encoder.resolutoin=32"], "Did you mean 'resolution'"),
    (["encoder={type: features, path: none}"], "encoder.path is 'none': no such file"),
    (["encoder={type: video, of: {model: ./nowhere}}"], "There is no folder './nowhere'"),
    (["encoder={type: audio, model: nobody/nothing}"], "'nobody/nothing' could not be loaded"),
    (["encoder={fuse: width}"], "missing a required argument: 'of'"),
    (["encoder.type=transfromers"], "No part called 'transfromers' in mllm.encoders. Did you mean 'transformers'"),
    (["lm.model=nobody/nothing"], "'nobody/nothing' could not be loaded"),
    (["connector.type=liner"], "No part called 'liner' in mllm.connectors. Did you mean 'linear'"),
    (["connector.tokens=5"], "connector.tokens is 5, but a grid of 4 x 4 patches"),
    (["connector.tokns=4"], "The connector linear does not take these arguments"),
    (["connector=null"], "names 'connector', which is not a part of the model"),
    (["stages.1.objectives=[{type: captoin}]"], "No part called 'captoin' in mllm.objectives. Did you mean 'caption'"),
    (
        ["stages.1.train={conector: 1e-3}"],
        "names 'conector', which is not a part of the model. Did you mean 'connector",
    ),
    (["data.train.path=none.csv"], "path is 'none.csv', and there is no such file or folder"),
    (["data.train.pth=x"], "the reader 'table' does not accept these arguments"),
    (
        ["data.val={format: coco-caption}"],
        "No part called 'coco-caption' in mllm.readers. Did you mean 'coco-captions'",
    ),
    (["data.train=null"], "Stage fit has no data"),
    (["decoding.max_new_tokens=9999"], "the language model was made for 256"),
    (["decoding.temperature=1.0e-40"], "'temperature' is 1e-40; expected 0 (greedy), or a number from"),
    (["decoding.num_return_sequences=3"], "'num_return_sequences' of transformers is not supported"),
    (["stages=[]"], "fine has no stages"),
    (["seed=x"], "seed: 'x'"),
    (["conector=1"], "conector: unknown key"),
]


@pytest.mark.parametrize(("overrides", "sentence"), BROKEN, ids=[overrides[0] for overrides, _ in BROKEN])
def test_broken_recipe_gets_its_sentence(file: Path, overrides: list[str], sentence: str) -> None:
    found = problems(str(file), overrides)
    assert any(sentence in problem for problem in found), found
    assert len(found) == len(set(found))
    assert len(found) <= 2, "one fault, no flood"


@pytest.fixture(scope="module")
def source(tiny_parts: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with a connector and an adapter, on the recipe's parts."""
    import mllm

    connector = {"type": "linear", "tokens": 4}
    model = mllm.assemble(tiny_parts[0], tiny_parts[1], connector, adapters=[{"type": "bottleneck"}])
    return model.save(tmp_path_factory.mktemp("source"))


def test_a_run_that_parts_are_taken_from_is_held_against_the_recipe(
    file: Path, source: Path, tiny_parts: tuple[str, str], tmp_path: Path
) -> None:
    own = [f"init.from={source}", "init.parts=[connector]"]
    assert problems(str(file), own) == []
    assert problems(str(file), [f"init.from={source}", "adapters=[{type: bottleneck}]"]) == []
    shutil.copytree(tiny_parts[1], tmp_path / "copy")  # the same weights under another name
    assert problems(str(file), [*own, f"lm.model={tmp_path / 'copy'}"]) == []
    other = tiny_lm(tmp_path / "other", seed=1)
    gelu = shutil.copytree(tiny_parts[1], tmp_path / "gelu") / "config.json"  # the same weights with another activation
    gelu.write_text(gelu.read_text().replace('"silu"', '"gelu"'))
    for overrides, sentence in (
        (["init.from=none"], "There is no model in none"),
        ([f"init.from={source}", "init.parts=[heads]"], "init.parts names 'heads', which"),
        ([f"init.from={source}", "init.parts=[conector]"], "Did you mean 'connector'"),
        ([f"init.from={source}"], "unknown or of another shape are adapters."),
        ([*own, "connector.shuffle=2"], "unknown or of another shape are"),
        ([*own, f"lm.model={other}"], f"was trained on another lm: {tiny_parts[1]}, and this recipe has {other}"),
        (
            [*own, f"lm.model={gelu.parent}"],
            f"was trained on another lm: {tiny_parts[1]}, and this recipe has {gelu.parent}",
        ),
        ([*own, "lm.init=random"], f"and this recipe has {tiny_parts[1]} (random weights). Use that lm"),
    ):
        (found,) = problems(str(file), overrides)
        assert sentence in found


def test_heads_have_distinct_names_and_agree_on_an_images_tokens(file: Path) -> None:
    two = "{type: retrieval, dim: 6}, {type: retrieval, dim: 8"
    (problem,) = problems(str(file), [f"heads=[{two}}}]"])
    assert "two heads are called 'retrieval': give one of them another name" in problem
    assert problems(str(file), [f"heads=[{two}, name: second}}]"]) == []
    both = [f"heads=[{two}, name: second}}]", "stages.1.objectives=[{type: retrieval}]"]
    (problem,) = problems(str(file), both)
    assert "the objective 'retrieval' takes one of heads.retrieval, heads.second. Keep one of them" in problem
    (problem,) = problems(str(file), [f"heads=[{two}, name: second, token: '[IMG]'}}]"])
    assert "The head heads.second reads '[IMG]', and an image's tokens are ['[RET]']. Set the head's token" in problem


def test_several_problems_are_all_reported(file: Path) -> None:
    found = problems(
        str(file),
        [
            "encoder.model=./no-encoder",
            "lm.model=./no-lm",
            "data.train.path=none.csv",
            "stages.1.objectives=[{type: x}]",
        ],
    )
    for sentence in ("./no-encoder", "./no-lm", "none.csv", "'x' in mllm.objectives"):
        assert sum(sentence in problem for problem in found) == 1, found
    assert len(found) == 4


def test_a_later_stages_own_problem_is_found(file: Path) -> None:
    (misfit,) = problems(str(file), ["stages.1.connector.tokens=5"])
    assert "connector.tokens is 5" in misfit


def test_a_fit_needs_a_linear_connector(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bent(Connector):
        num_tokens = 1

        def __init__(self, **_: Any) -> None:
            super().__init__()
            self.project = torch.nn.GELU()

    monkeypatch.setitem(registry.table("connectors"), "bent", f"{__name__}:Bent")
    monkeypatch.setitem(sys.modules, __name__, type("Module", (), {"Bent": Bent}))
    assert problems(str(file), ["connector={type: bent}"]) == [
        "Stage fit fits the connector, which does not end in a linear map: use another connector type."
    ]


def test_check_does_without_what_only_training_needs(file: Path) -> None:
    code = f"""
import sys
from mllm.planning.check import problems
assert problems({str(file)!r}) == []
heavy = ("peft", "bitsandbytes", "matplotlib", "mllm.training.train")
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr
