"""Parts that are stored in half precision, and stages of several precisions."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
import yaml

import mllm
from mllm.testing import tiny_image

IMAGE = tiny_image(1)


def planned(clause: str, raises: type[BaseException]) -> pytest.MarkDecorator:
    return pytest.mark.xfail(strict=True, raises=raises, reason=f"Right with the parts that people bring: {clause}")


half = planned("an encoder stored in half precision beside a connector in float32", raises=RuntimeError)


@pytest.fixture(scope="module")
def half_encoder(tiny_parts, tmp_path_factory):
    """The tiny encoder, stored in bfloat16."""
    folder = tmp_path_factory.mktemp("half")
    transformers.AutoModel.from_pretrained(tiny_parts[0]).to(torch.bfloat16).save_pretrained(folder)
    transformers.AutoImageProcessor.from_pretrained(tiny_parts[0], backend="pil").save_pretrained(folder)
    return str(folder)


@half
@pytest.mark.parametrize("connector", ["linear", "mlp"])
@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda model: model.generate([[IMAGE, "A"]], max_new_tokens=2), id="generate"),
        pytest.param(lambda model: model.see([IMAGE]).ask("what?", max_new_tokens=2), id="see"),
    ],
)
def test_an_encoder_in_half_precision_answers(half_encoder, tiny_parts, connector, call):
    model = mllm.assemble(half_encoder, tiny_parts[1], connector)
    assert {parameter.dtype for parameter in model.encoder.parameters()} == {torch.bfloat16}
    call(model)


@pytest.fixture
def train(tiny_parts, tmp_path):
    """Return a function that trains stages, beside the encoder of a folder."""
    IMAGE.save(tmp_path / "a.png")
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "a.png", "caption": "a"}] * 4))

    def trained(*stages: dict[str, Any], encoder: str = tiny_parts[0], connector: str = "linear") -> list[float]:
        recipe = {
            "name": "tiny",
            "encoder": {"model": encoder},
            "lm": {"model": tiny_parts[1]},
            "connector": {"type": connector},
            "data": {"train": {"format": "table", "path": str(tmp_path / "rows.json")}},
            "stages": list(stages),
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        run = mllm.train(str(tmp_path / "recipe.yaml"), out=tmp_path / "run")
        rows = map(json.loads, (run.path / "log.jsonl").read_text().splitlines())
        return [row["loss"] for row in rows if "loss" in row]

    return trained


def stage(name: str, **optim: Any) -> dict[str, Any]:
    return {"name": name, "train": ["connector"], "steps": 1, "batch_size": 2, "optim": optim}


@half
@pytest.mark.parametrize("connector", ["linear", "mlp"])
def test_an_encoder_in_half_precision_is_trained_on(train, half_encoder, connector):
    assert len(train(stage("align"), encoder=half_encoder, connector=connector)) == 1


def test_an_encoder_in_half_precision_is_fitted_on(train, half_encoder):
    assert train({"name": "fit", "fit": {}}, encoder=half_encoder) == []


@planned("two stages of two precisions", raises=ValueError)
def test_two_stages_of_two_precisions_are_trained(train, fresh_accelerator):
    assert len(train(stage("one", precision="float32"), stage("two", precision="bfloat16"))) == 2
