"""Exports in half precision, of models in half precision or on a GPU, and what an export needs of the memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import mllm
from mllm.cli.app import app
from mllm.errors import MLLMError
from mllm.export.export import export
from mllm.testing import LM_FAMILIES, tiny_tokenizer

HALVES = [torch.bfloat16, torch.float16]


def values(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_weights_are_the_models_rounded(dtype, tiny_clip, tiny_parts, tmp_path):
    model = mllm.assemble({"model": tiny_clip, "layer": -1}, tiny_parts[1], "mlp")
    before = values(model)
    name = str(dtype).removeprefix("torch.")
    results = export(model, tmp_path / "half", to="hf-llava", dtype=name)
    export(model, tmp_path / "whole", to="hf-llava")
    half, whole = (load_file(tmp_path / folder / "model.safetensors") for folder in ("half", "whole"))
    assert half.keys() == whole.keys()
    assert all(torch.equal(half[name], whole[name].to(dtype)) for name in whole)
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "half", dtype="auto")
    assert stock.dtype == dtype
    share = max(one.difference / one.largest for one in results)
    assert 0 < share < {torch.bfloat16: 0.2, torch.float16: 0.03}[dtype]
    card = (tmp_path / "half" / "README.md").read_text()
    assert f"In {name}, the largest difference of any logit is {share:.2g} of the largest logit" in card
    assert "is allowed" in card
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key


@pytest.mark.parametrize("to", ["hf-llava", "hf-blip2"])
def test_a_language_model_in_bfloat16_stays_what_it_is(to, tiny_clip, tiny_parts, tmp_path):
    qformer = {"type": "qformer", "tokens": 4, "dim": 16, "layers": 2, "heads": 2, "norm": False}
    encoder = {"model": tiny_clip, "layer": -1} if to == "hf-llava" else {"model": tiny_parts[0], "select": "all"}
    lm = {"model": tiny_parts[1], "dtype": "bfloat16"}
    lora = {"type": "lora", "r": 2, "targets": ["q_proj"]}
    model = mllm.assemble(encoder, lm, "mlp" if to == "hf-llava" else qformer, adapters=[lora])
    before = values(model)
    export(model, tmp_path / "out", to=to, dtype="bfloat16")
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in after)


def test_float16_that_overflows_is_refused(tiny_clip, tmp_path):
    folder = LM_FAMILIES["llama"](tmp_path / "lm")
    lm = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        lm.model.layers[0].mlp.down_proj.weight *= 1e7  # representable in bfloat16, not in float16
    lm.save_pretrained(folder)
    model = mllm.assemble({"model": tiny_clip, "layer": -1}, folder, "linear")
    with pytest.raises(MLLMError, match="or in bfloat16, whose range is that of float32"):
        export(model, tmp_path / "out", to="hf-llava", dtype="float16")
    assert not (tmp_path / "out").exists()
    export(model, tmp_path / "out", to="hf-llava", dtype="bfloat16")


def test_the_command_takes_a_precision(tiny_clip, tiny_parts, tmp_path):
    run = mllm.assemble({"model": tiny_clip, "layer": -1}, tiny_parts[1], "linear").save(tmp_path / "run")
    arguments = ["export", str(run), str(tmp_path / "out"), "--to", "hf-llava", "--dtype"]
    done = CliRunner().invoke(app, [*arguments, "bfloat16"])
    assert done.exit_code == 0, done.output
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    with pytest.raises(MLLMError, match="Did you mean 'float32'"):
        CliRunner().invoke(app, [*arguments, "float31"], catch_exceptions=False)


def large_lm(folder: Path, dtype: torch.dtype) -> tuple[str, int]:
    """Save a language model of 38 million weights, and return its folder and its bytes in float32."""
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1400,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder), 4 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
@pytest.mark.parametrize(("dtype", "lora"), [("float32", "plain"), ("bfloat16", "lora")])
def test_never_more_than_two_copies_of_the_weights(dtype, lora, tiny_clip, tiny_parts, tmp_path):
    lm, size = large_lm(tmp_path / "lm", getattr(torch, dtype))
    script = Path(__file__).with_name("peak_memory.py")
    arguments = [tiny_clip, tiny_parts[1], lm, size, tmp_path / "out", dtype, lora]
    variables = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 1 < float(done.stdout.splitlines()[-1]) < 2.5  # beside the weights it holds buffers
