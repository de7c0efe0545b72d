"""Test the configurations of published models, and the sizes of the papers' recipes on the meta device."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from torch import nn

from mllm.assembly import Assembly
from mllm.config import loading as recipe
from mllm.hub import loading as hub
from mllm.hub.published import configuration
from mllm.planning.check import problems
from mllm.planning.paper import meta_model

MODELS = Path(__file__).parents[2] / "recipes" / "models"

# millions of parameters, from the papers and model cards (towers without the projection of the dual encoder)
SIZES = {
    "openai/clip-vit-large-patch14": 303,
    "microsoft/beit-large-patch16-224": 304,
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": 632,
}
LM_SIZES = {
    "EleutherAI/gpt-j-6b": 6_050,
    "openai-community/gpt2": 124.4,
    "facebook/opt-1.3b": 1_316,
    "facebook/opt-2.7b": 2_700,
    "facebook/opt-6.7b": 6_700,
    "huggyllama/llama-7b": 6_738,
    "lmsys/vicuna-7b-v1.5": 6_738,
    "01-ai/Yi-6B-Chat": 6_061,
}

ATTENTION, NORM = 4 * (512 * 512 + 512), 2 * 512  # of width 512
# A layer of ClipCap's mapper: attention, a feed-forward layer of 2 x 768, and two LayerNorms.
CLIPCAP = 4 * (768 * 768 + 768) + (768 * 1536 + 1536) + (1536 * 768 + 768) + 2 * 2 * 768

GILL_HEADS = [  # without the one of the last stage
    {"type": "retrieval", "dim": 256, "token": "[IMG0]"},
    {"type": "generation", "tokens": 8, "length": 77, "width": 768},
]
# recipe, overrides -> trained weights and visual tokens as published
TRAINED = [
    ("limber", {}, 12_587_008, 144),
    ("limber", {"encoder": {"model": "microsoft/beit-large-patch16-224"}}, 4_198_400, 196),
    ("limber", {"encoder": {"model": "timm/nf_resnet50", "select": "pooled"}, "connector.tokens": 2}, 16_785_408, 2),
    ("frozen", {}, 2048 * 2 * 4096 + 2 * 4096, 2),  # and the encoder
    ("yi-vl", {}, 1280 * 4096 + 4096 * 4096 + 6 * 4096, 1024),  # two maps and their LayerNorms
    ("mapl", {}, 3_431_680, 32),
    ("magma", {}, 12_587_008 + 2 * 4096 + 235_024_384, 144),  # the prefix, its LayerNorm, the adapters
    ("fromage", {}, 5_513_729, 1),  # with [RET]'s row and the scale
    ("gill", {"heads": GILL_HEADS}, 50_096_385, 4),  # with eight rows and the scale
    ("viecap", {}, 513 * 7680 + 10 * 768 + 8 * CLIPCAP + 769 * 768, 10),  # its vectors, queries, layers and output
    # its input, queries, two attentions, ffn, norms and output
    ("maccap", {}, 513 * 512 + 32 * 512 + 2 * ATTENTION + 2 * 512 * 2048 + 2560 + 4 * NORM + 513 * 2048, 32),
    ("zeronlg", {}, 513 * 768, 1),
    ("llava", {"stages.1.adapters": []}, 1024 * 4096 + 4096 + 4096 * 4096 + 4096, 576),
]


# recipe, stage, trained millions, all heads included: where the papers give a rounded number
ROUNDED = [("blip2-stage1", 0, 188), ("blip2-opt", 1, 188), ("blip2-t5", 1, 188)]

# recipe -> visual tokens, where the papers give the tokens and not the weights
TOKENS = {"frozen": 2, "simvlg": 29, "simvlg-video": 29, "blip2-opt": 32, "blip2-t5": 32, "cg-vlm": 256, "yi-vl": 1024}


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def built(name: str, overrides: dict[str, object]) -> Assembly:
    config = recipe.load(name, overrides)
    return meta_model(config.stages[-1])


@pytest.mark.parametrize("name", SIZES)
def test_encoders_have_their_published_size(name: str) -> None:
    model = built("limber", {"encoder": {"model": name}})
    assert size(model.get_submodule("encoder")) / 1e6 == pytest.approx(SIZES[name], rel=0.01)


def test_a_dual_encoder_has_its_published_size() -> None:
    assert size(built("viecap", {}).get_submodule("encoder")) == 151_277_313  # CLIP ViT-B/32 as released


@pytest.mark.parametrize("name", LM_SIZES)
def test_language_models_have_their_published_size(name: str) -> None:
    model = built("limber", {"lm.model": name})
    assert size(model.get_submodule("lm")) / 1e6 == pytest.approx(LM_SIZES[name], rel=0.02)


@pytest.mark.parametrize(("name", "overrides", "weights", "tokens"), TRAINED)
def test_recipes_train_what_the_papers_train(
    name: str, overrides: dict[str, object], weights: int, tokens: int
) -> None:
    model = built(name, overrides)
    assert sum(size(child) for part, child in model.named_children() if part not in ("encoder", "lm")) == weights
    assert model.connector.num_tokens == tokens


@pytest.mark.parametrize(("name", "stage", "millions"), ROUNDED)
def test_recipes_train_about_what_the_papers_train(name: str, stage: int, millions: int) -> None:
    config = recipe.load(name)
    model = meta_model(config.stages[stage])
    trained = sum(size(child) for part, child in model.named_children() if part not in ("encoder", "lm"))
    assert trained / 1e6 == pytest.approx(millions, rel=0.015)


@pytest.mark.parametrize("name", TOKENS)
def test_recipes_have_the_papers_tokens(name: str) -> None:
    assert built(name, {}).connector.num_tokens == TOKENS[name]


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_can_be_loaded(path: Path) -> None:
    name = path.stem.replace("--", "/")
    values = configuration(name)
    assert values is not None
    assert values["model_type"] == "shape" or hub.load_config(name).model_type == values["model_type"]


def test_other_models_have_no_bundled_configuration() -> None:
    assert configuration("facebook/opt-350m") is None
    assert configuration("gpt2") is None


def test_check_works_from_the_configuration_and_names_only_the_data(tmp_path: Path) -> None:
    started = time.monotonic()
    (problem,) = problems("limber")
    assert "cc3m/captions_train.json" in problem
    assert time.monotonic() - started < 60  # shapes only: initializing six billion weights would take longer
