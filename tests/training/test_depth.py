"""An encoder's blocks by their depth: stochastic depth is transformers' own, learning rates are LAVIS's formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BeitConfig, BeitImageProcessor, BeitModel

import mllm
from mllm.config.loading import check
from mllm.errors import MLLMError
from mllm.testing import ENCODER_FAMILIES, tiny_image
from mllm.training.depth import blocks_of, by_depth, drop_paths
from mllm.training.setup import parameter_groups

SHAPE: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32,
    "patch_size": 8, "use_mean_pooling": False, "layer_scale_init_value": 0.5, "drop_path_rate": 0.0,
}  # fmt: skip


@pytest.fixture
def beit(tmp_path: Path) -> str:
    torch.manual_seed(0)
    BeitModel(BeitConfig(**SHAPE), add_pooling_layer=False).save_pretrained(tmp_path / "beit")
    BeitImageProcessor(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        tmp_path / "beit"
    )
    return str(tmp_path / "beit")


def test_stochastic_depth_is_that_of_transformers(beit: str, tiny_parts: Any) -> None:
    encoder: Any = mllm.assemble(beit, tiny_parts[1], "linear").encoder
    pixels = encoder.preprocess([tiny_image(seed) for seed in range(6)])
    theirs = BeitModel.from_pretrained(beit, drop_path_rate=0.6, add_pooling_layer=False, trust_remote_code=False)
    hooks = drop_paths(encoder, 0.6, torch.device("cpu"))

    def both(training: bool) -> tuple[torch.Tensor, torch.Tensor]:
        encoder.train(training), theirs.train(training)
        torch.manual_seed(5)
        ours = encoder(pixels)
        torch.manual_seed(5)
        return ours, theirs(pixels).last_hidden_state[:, 1:]

    torch.testing.assert_close(*both(training=True))
    plain = both(training=False)
    torch.testing.assert_close(*plain)
    assert not torch.equal(both(training=True)[0], plain[0])
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(both(training=True)[0], plain[0])


def test_learning_rates_fall_by_lavis_formula(beit: str, tiny_parts: tuple[str, str]) -> None:
    model = mllm.assemble(beit, tiny_parts[1], "linear")
    rates = {"encoder": 1e-3, "connector": 2e-3}
    optim = {"layer_decay": 0.9}
    stage = check({"name": "x", "stages": [{"name": "a", "train": rates, "steps": 1, "optim": optim}]}, "x").stages[0]
    found = {id(p): group["lr"] for group in parameter_groups(model, stage) for p in group["params"]}
    layers = SHAPE["num_hidden_layers"]
    for name, parameter in model.named_parameters():
        if name.startswith("connector"):
            assert found[id(parameter)] == 2e-3
        elif name.startswith("encoder"):
            number = 0 if ".embeddings." in name else layers  # eva_vit.py: get_num_layer
            if ".layer." in name or ".layers." in name:
                number = int(name.partition(".layer")[2].lstrip("s.").partition(".")[0]) + 1
            scales = [0.9 ** (layers + 1 - index) for index in range(layers + 2)]  # blip2.py: get_optimizer_params
            assert found[id(parameter)] == pytest.approx(1e-3 * scales[number]), name
    assert {round(rate / 1e-3, 4) for rate in found.values()} == {0.9, 0.81, 0.729, 0.6561, 0.5905, 2.0}


@pytest.mark.parametrize("family", ["clip", "siglip", "dinov2", "vit"])
def test_the_usual_vision_transformers_have_blocks(family: str, tmp_path: Path, tiny_parts: Any) -> None:
    encoder: Any = mllm.assemble(ENCODER_FAMILIES[family](tmp_path), tiny_parts[1], "linear").encoder
    assert len(blocks_of(encoder)) >= 2
    assert len(drop_paths(encoder, 0.5, torch.device("cpu"))) == 2 * len(blocks_of(encoder)) - 2  # not the first
    numbers = by_depth([{"params": list(encoder.parameters()), "lr": 1.0}], encoder, 0.5)
    assert [group["lr"] for group in numbers] == sorted((group["lr"] for group in numbers), reverse=True)


def test_it_is_refused_where_it_would_do_nothing_or_something_else(tmp_path: Path, beit: str, tiny_parts: Any) -> None:
    encoder: Any = mllm.assemble(ENCODER_FAMILIES["resnet"](tmp_path), tiny_parts[1], "linear").encoder
    with pytest.raises(MLLMError, match="blocks with attention and an MLP"):
        drop_paths(encoder, 0.5, torch.device("cpu"))
    other: Any = mllm.assemble(beit, tiny_parts[1], "linear").encoder
    blocks_of(other)[1].register_forward_hook(lambda _, __, output: output + 1)
    with pytest.raises(MLLMError, match="not all that is added"):
        drop_paths(other, 0.5, torch.device("cpu"))
    stages = [{"name": "a", "train": {"connector": 1e-3}, "steps": 1, "optim": {"drop_path": 0.1}}]
    with pytest.raises(MLLMError, match="for an encoder that trains"):
        check({"name": "x", "stages": stages}, "x")


def test_a_stage_trains_with_both_and_leaves_nothing_behind(
    tmp_path: Path, beit: str, tiny_parts: tuple[str, str]
) -> None:
    for index in range(4):
        tiny_image(index).save(tmp_path / f"{index}.png")
    rows = [{"image": f"{index}.png", "caption": text} for index, text in enumerate(["red", "a dog", "x", "so"])]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    losses: dict[float, list[float]] = {}
    for rate in (0.0, 0.9):
        recipe = {
            "name": "depth",
            "encoder": {"model": beit},
            "lm": {"model": tiny_parts[1]},
            "connector": {"type": "linear"},
            "data": {"train": {"format": "table", "path": str(tmp_path / "rows.json")}},
            "optim": {"layer_decay": 0.9, "drop_path": rate, "weight_decay": 0.1},
            "stages": [{"name": "a", "train": {"encoder": 1e-3, "connector": 1e-3}, "steps": 3, "batch_size": 4}],
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        run = mllm.train(str(tmp_path / "recipe.yaml"), out=tmp_path / f"run{rate}")
        log = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
        losses[rate] = [row["loss"] for row in log if "loss" in row]
        image = [tiny_image()]
        model = mllm.load(run.path)
        torch.testing.assert_close(model.features(image), model.features(image))
    assert losses[0.0] != losses[0.9] and len(losses[0.9]) == 3
