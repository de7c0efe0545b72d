"""The exported folder: both lines of transformers read it, its numbers are true, others may read its files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, GenerationConfig

import mllm
from mllm.export.export import export
from mllm.testing import ENCODER_FAMILIES, LM_FAMILIES, tiny_encoder, tiny_image, tiny_lm
from mllm.testing.lms import LMFamily

HERE = Path(__file__).parent
OTHER = os.environ.get("MLLM_OTHER_TRANSFORMERS")  # the Python of an environment with transformers 4.57
NAMES: dict[str, str] = json.loads((HERE / "names_4_57.json").read_text())
QFORMER = {"type": "qformer", "tokens": 4, "dim": 24, "layers": 2, "heads": 2, "norm": False}
LAYERS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
NARROW = {**LAYERS, "head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
OPT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 32}

CHAT = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}\n{% endfor %}<assistant>"


def scaled(kind: str, **others: Any) -> dict[str, Any]:
    return {"rope_theta": 20_000.0, "rope_type": kind, "factor": 4.0, **others}


# Rotary embeddings that are not those of a class's defaults.
ROPES: dict[str, LMFamily] = {
    "base": LMFamily("llama", {**LAYERS, "rope_parameters": {"rope_theta": 500_000.0, "rope_type": "default"}}),
    "llama3": LMFamily(
        "llama",
        {
            **LAYERS,
            "rope_parameters": scaled(
                "llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
            ),
        },
        start=True,
    ),
    "linear": LMFamily("qwen2", {**LAYERS, "rope_parameters": scaled("linear")}),
    "yarn": LMFamily("qwen2", {**LAYERS, "rope_parameters": scaled("yarn", original_max_position_embeddings=64)}),
    "partial": LMFamily(
        "stablelm",
        {**LAYERS, "rope_parameters": {"rope_theta": 2e4, "rope_type": "default", "partial_rotary_factor": 0.5}},
    ),
    "longrope": LMFamily(
        "phi3",
        {
            **LAYERS,
            "original_max_position_embeddings": 128,
            "rope_parameters": {
                "rope_theta": 1e4,
                "rope_type": "longrope",
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [1.0, 2.0, 3.0, 4.0],
            },
        },
    ),
    "by layer": LMFamily(
        "gemma3_text",
        {
            **NARROW,
            "query_pre_attn_scalar": 8,
            "rope_parameters": {
                "full_attention": {"rope_theta": 3e6, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_theta": 2e4, "rope_type": "default"},
            },
        },
        start=True,
    ),
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return a function that saves an encoder or a language model of a family, and returns its folder."""
    families: dict[str, Callable[[Path], str]] = {**ENCODER_FAMILIES, **LM_FAMILIES}
    families["opt"] = LMFamily("opt", OPT, start=True)
    return lambda name: families[name](tmp_path_factory.mktemp("part") / name)


def saved(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as weights:
        return set(weights.keys())


@pytest.mark.parametrize("case", NAMES)
def test_weights_have_the_names_that_each_line_of_transformers_reads(case, parts, tmp_path):
    to, *names = case.split()
    if to == "llava":
        model = mllm.assemble({"model": parts(names[0]), "layer": -1}, parts(names[1]), "linear")
    else:
        encoder = {"model": tiny_encoder(tmp_path / "encoder"), "select": "all"}
        model = mllm.assemble(encoder, parts(names[0]), QFORMER)
    export(model, tmp_path / "out", to=f"hf-{to}")
    tied = {name for name in NAMES[case].split() if name.endswith("lm_head.weight")} - saved(tmp_path / "out")
    assert saved(tmp_path / "out") == set(NAMES[case].split()) - tied
    assert not tied or json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]["tie_word_embeddings"]
    auto: Any = AutoModelForImageTextToText
    _, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_embeddings_have_older_names_too(rope, tiny_clip, tmp_path):
    """Without the name of 5.x the file is one of 4.57, which transformers itself translates."""
    model = mllm.assemble({"model": tiny_clip, "layer": -1}, ROPES[rope](tmp_path / "lm"), "linear")
    export(model, tmp_path / "out", to="hf-llava")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    present = rope_of(tmp_path / "out")
    assert present == model.lm.model.config.rope_parameters
    del config["text_config"]["rope_parameters"]
    file.write_text(json.dumps(config))
    assert rope_of(tmp_path / "out") == present


def rope_of(folder: Path) -> dict[str, Any]:
    """Return the rotary embeddings that transformers reads; ``type`` is the older name of ``rope_type``."""
    values = AutoConfig.from_pretrained(folder).text_config.rope_parameters
    return {name: value for name, value in values.items() if name != "type"}


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077], indirect=True, ids=oct)
def test_files_have_the_permissions_of_new_files(umask, tiny_clip, tiny_parts, tmp_path):
    export(mllm.assemble({"model": tiny_clip, "layer": -1}, tiny_parts[1]), tmp_path / "out", to="hf-llava")
    paths = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert {path.stat().st_mode & 0o777 for path in paths if path.is_dir()} == {0o777 & ~umask}
    assert {path.stat().st_mode & 0o777 for path in paths if path.is_file()} == {0o666 & ~umask}


@pytest.mark.parametrize(("side", "patch"), [(32, 8), (48, 16)])
@pytest.mark.parametrize("select", ["patches", "all"])
def test_the_tokens_of_an_image_are_as_many_as_its_features(side, patch, select, tiny_parts, tmp_path):
    encoder = {"model": tiny_encoder(tmp_path / "encoder", side=side, patch=patch), "layer": -1, "select": select}
    export(mllm.assemble(encoder, tiny_parts[1], "linear"), tmp_path / "out", to="hf-llava")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    inputs = processor(images=tiny_image(), text="<image>", return_tensors="pt")
    with torch.no_grad():
        features = stock.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-1]
    wanted = features.shape[1] - (select == "patches")
    assert int((inputs["input_ids"] == stock.config.image_token_id).sum()) == wanted
    assert stock.config.image_seq_length == wanted
    assert processor.patch_size == patch
    assert processor.num_additional_image_tokens == 1
    assert processor.vision_feature_select_strategy == ("default" if select == "patches" else "full")


def test_the_folder_ends_answers_where_the_model_does(tiny_clip, tmp_path):
    lm = LM_FAMILIES["llama"](tmp_path / "lm")
    stops = [256, 65, 66]
    GenerationConfig(eos_token_id=stops).save_pretrained(lm)
    tokenizer = AutoTokenizer.from_pretrained(lm)
    export(mllm.assemble({"model": tiny_clip, "layer": -1}, lm, "linear"), tmp_path / "out", to="hf-llava")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert tokenizer.eos_token_id == 256
    assert generation["eos_token_id"] == stops
    assert generation["bos_token_id"] == text["bos_token_id"] == tokenizer.bos_token_id
    assert generation["pad_token_id"] == text["pad_token_id"] == 256  # it has none of its own
    assert text["eos_token_id"] == 256
    processor = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    assert processor.tokenizer.pad_token_id == 256
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == processor.image_token_id
    assert generation["suppress_tokens"] == [processor.image_token_id]


def test_tokens_without_a_trained_embedding_are_never_generated(tiny_clip, tmp_path):
    lm = tiny_lm(tmp_path / "lm")
    tokenizer = AutoTokenizer.from_pretrained(lm)
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(lm)
    export(mllm.assemble({"model": tiny_clip, "layer": -1}, lm, "linear"), tmp_path / "out", to="hf-llava")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    rows = stock.get_output_embeddings().weight
    untrained = [number for number, row in enumerate(rows) if not row.any()]
    assert untrained == [258, 259, 260]
    assert stock.generation_config.suppress_tokens == untrained


def test_no_file_names_a_folder_of_this_machine(tiny_clip, tiny_parts, tmp_path):
    export(mllm.assemble({"model": tiny_clip, "layer": -1}, tiny_parts[1]), tmp_path / "out", to="hf-llava")
    for file in (*(tmp_path / "out").glob("*.json"), *(tmp_path / "out").glob("*.md")):
        text = file.read_text()
        assert tiny_clip not in text and tiny_parts[1] not in text and str(tmp_path) not in text


@pytest.mark.extras
@pytest.mark.timeout(1200)  # two other processes import transformers
@pytest.mark.skipif(OTHER is None, reason="MLLM_OTHER_TRANSFORMERS names no Python with transformers 4.57")
def test_both_lines_of_transformers_answer_alike(parts, tiny_clip, tmp_path):
    folders = []
    for to in ("hf-llava", "hf-blip2"):
        encoder = {"model": tiny_clip, "layer": -1} if to == "hf-llava" else {"model": parts("vit"), "select": "all"}
        connector = "mlp" if to == "hf-llava" else QFORMER
        lms: dict[str, Callable[[Path], str]] = {**ROPES, "mixtral": LM_FAMILIES["mixtral"]}
        for name, family in lms.items():
            model = mllm.assemble(encoder, family(tmp_path / to / "lm" / name), connector)
            folders.append(tmp_path / to / name)
            export(model, folders[-1], to=to)
    for tower, resize in (("siglip", "pad"), ("dinov2", "crop"), ("vit", "stretch"), ("clip", "crop")):
        lm = ROPES["llama3"](tmp_path / tower)
        tokenizer = AutoTokenizer.from_pretrained(lm)
        tokenizer.chat_template = CHAT if tower == "siglip" else None
        tokenizer.save_pretrained(lm)
        model = mllm.assemble({"model": parts(tower), "layer": -2, "resize": resize}, lm, "linear")
        folders.append(tmp_path / f"out-{tower}")
        export(model, folders[-1], to="hf-llava")

    def run(python: str, *arguments: object) -> Any:
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [python, str(HERE / "other_transformers.py"), *map(str, arguments)]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    assert OTHER is not None
    assert run(OTHER, "names") == NAMES
    for folder, other, here in zip(
        folders, run(OTHER, "answers", *folders), run(sys.executable, "answers", *folders), strict=True
    ):
        assert here["lacks"] == []
        assert other == here, folder.name
